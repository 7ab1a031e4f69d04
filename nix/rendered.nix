# What NixOS would install for a few configurations of the module: paths below / and their text.
# The text has lost its string context, so that reading it builds nothing.
{
  self,
  nixpkgs,
  system,
}:
let
  inherit (nixpkgs) lib;

  units = [
    "codex-responses-proxy.service"
    "codex-responses-proxy.socket"
    "codex-responses-proxy-port.service"
  ];

  render =
    settings:
    let
      machine = lib.nixosSystem {
        modules = [
          self.nixosModules.default
          {
            nixpkgs.hostPlatform = system;
            system.stateVersion = "26.05";
            services.codex-responses-proxy = lib.mkMerge [
              {
                enable = true;
                keyFile = "/run/secrets/openai-api-key";
                # where the machine test's stand-in listens
                upstreamUrl = "http://127.0.0.1:9001/v1/responses";
              }
              settings
            ];
          }
        ];
      };
      inherit (machine) config;
      unitFile = unit: lib.nameValuePair "etc/systemd/system/${unit}" config.systemd.units.${unit}.text;
      etcFile = path: lib.nameValuePair "etc/${path}" config.environment.etc.${path}.text;
    in
    lib.mapAttrs (_: builtins.unsafeDiscardStringContext) (
      lib.listToAttrs (
        map unitFile units
        ++ lib.optional config.services.codex-responses-proxy.codexConfig.enable (
          etcFile "codex/config.toml"
        )
      )
    );
in
{
  configurations = lib.mapAttrs (_: render) {
    plain.codexConfig.enable = true;
    other-port.port = 8400;
    restricted = {
      allowedUsers = [
        "alice"
        "@developers"
      ];
      httpShutdown = true;
    };
  };

  # a key in the store would be everybody's
  acceptsStorePath =
    (builtins.tryEval
      (render {
        keyFile = lib.mkForce "${builtins.storeDir}/00000000000000000000000000000000-key";
      })."etc/systemd/system/codex-responses-proxy.service"
    ).success;
}
