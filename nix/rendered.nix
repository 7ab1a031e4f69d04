# The units that NixOS would install, as text, for a few configurations of the module.
# The text has lost its string context: reading it builds nothing.
{
  self,
  nixpkgs,
  system,
}:
let
  inherit (nixpkgs) lib;
  render =
    settings:
    let
      inherit
        (nixpkgs.lib.nixosSystem {
          modules = [
            self.nixosModules.default
            {
              nixpkgs.hostPlatform = system;
              system.stateVersion = "26.05";
              services.codex-responses-proxy = {
                enable = true;
                keyFile = "/run/secrets/openai-api-key";
              }
              // settings;
            }
          ];
        })
        config
        ;
      unit = name: builtins.unsafeDiscardStringContext config.systemd.units.${name}.text;
    in
    lib.genAttrs [
      "codex-responses-proxy.service"
      "codex-responses-proxy.socket"
      "codex-responses-proxy-port.service"
    ] unit;
in
lib.mapAttrs (_: render) {
  plain = { };
  restricted.allowedUsers = [
    "alice"
    "@developers"
  ];
}
