# Evaluates the example machines with small stand-ins for agenix and sops-nix, and checks their units.
# examples/nixos/check does so with the real modules.
{
  self,
  nixpkgs,
  pkgs,
}:
let
  inherit (nixpkgs) lib;
  inherit (lib) mkOption types;

  secrets =
    options:
    mkOption {
      type = types.attrsOf (
        types.submodule (
          { name, ... }:
          {
            options = options name;
          }
        )
      );
    };

  # the options that the examples use
  agenix.options.age.secrets = secrets (name: {
    file = mkOption { type = types.path; };
    path = mkOption {
      type = types.str;
      default = "/run/agenix/${name}";
    };
  });
  sops.options.sops = {
    secrets = secrets (name: {
      sopsFile = mkOption { type = types.path; };
      path = mkOption {
        type = types.str;
        default = "/run/secrets/${name}";
      };
    });
  };

  machine =
    file: inputs:
    ((import file).outputs (
      inputs
      // {
        inherit nixpkgs;
        codex-responses-proxy = self;
      }
    )).nixosConfigurations.machine.extendModules
      {
        # in place of a real machine's hardware configuration
        modules = [ { boot.isContainer = true; } ];
      };

  machines = {
    agenix = machine ../../examples/nixos/agenix/flake.nix {
      agenix.nixosModules.default = agenix;
    };
    sops-nix = machine ../../examples/nixos/sops-nix/flake.nix {
      sops-nix.nixosModules.sops = sops;
    };
  };

  unit =
    name:
    let
      inherit (machines.${name}) config;
      failed = lib.filter (x: !x.assertion) config.assertions;
      text =
        builtins.unsafeDiscardStringContext
          config.systemd.units."codex-responses-proxy.service".text;
    in
    if failed == [ ] then
      builtins.toFile "${name}.service" text
    else
      throw (lib.concatLines (map (x: x.message) failed));
in
pkgs.runCommand "codex-responses-proxy-examples" { passthru = { inherit machines; }; } ''
  grep -q '^StandardInput=file:/run/agenix/openai-api-key$' ${unit "agenix"}
  grep -q '^StandardInput=file:/run/secrets/openai-api-key$' ${unit "sops-nix"}
  for unit in ${unit "agenix"} ${unit "sops-nix"}; do
    grep -q '^X-Restart-Triggers=' $unit
    grep '^After=' $unit | grep agenix-install-secrets.service | grep -q sops-install-secrets.service
  done
  touch $out
''
