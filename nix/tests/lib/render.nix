# The units of each scenario as NixOS would install them: paths below / and their text. The string context of the
# text is discarded, so reading it builds nothing.
{
  self,
  nixpkgs,
  system,
}:
let
  inherit (nixpkgs) lib;

  # A machine of the given platform with these settings.
  machine =
    platform: settings:
    lib.nixosSystem {
      modules = [
        # A machine may import both names: they are one module.
        self.nixosModules.default
        self.nixosModules.codex-responses-proxy
        {
          nixpkgs = platform;
          system.stateVersion = "26.05";
          services.codex-responses-proxy = lib.mkMerge [
            {
              enable = true;
              package = lib.mkDefault self.packages.${system}.default;
              keyFile = lib.mkDefault "/run/secrets/openai-api-key";
              # the machine test's stand-in upstream
              upstreamUrl = "http://127.0.0.1:9001/v1/responses";
            }
            settings
          ];
        }
      ];
    };

  render =
    settings:
    let
      inherit ((machine { hostPlatform = system; } settings).config) systemd;
    in
    lib.listToAttrs (
      map
        (unit: {
          name = "etc/systemd/system/${unit}";
          value = builtins.unsafeDiscardStringContext systemd.units.${unit}.text;
        })
        [
          "codex-responses-proxy.service"
          "codex-responses-proxy.socket"
          "codex-responses-proxy-port.service"
        ]
    );
in
{
  inherit machine;
  scenarios = lib.mapAttrs (_: render) (import ./scenarios.nix);
}
