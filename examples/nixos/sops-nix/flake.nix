# A machine that runs Codex from a sops-nix secret. `nix flake check` of the project evaluates this file with
# stand-ins for sops-nix's options; against sops-nix's own module, in this folder:
#
#   nix eval --no-write-lock-file --override-input codex-responses-proxy ../../.. \
#     --raw '.#nixosConfigurations.machine.config.systemd.units."codex-responses-proxy.service".text'
{
  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    sops-nix = {
      url = "github:Mic92/sops-nix";
      inputs.nixpkgs.follows = "nixpkgs";
    };
    codex-responses-proxy = {
      # OWNER: whose copy of the project you trust with your key, your own for one
      url = "github:OWNER/codex-responses-proxy";
      inputs.nixpkgs.follows = "nixpkgs";
    };
  };

  outputs =
    {
      nixpkgs,
      sops-nix,
      codex-responses-proxy,
      ...
    }:
    {
      nixosConfigurations.machine = nixpkgs.lib.nixosSystem {
        system = "x86_64-linux";
        modules = [
          # beside the machine's own ./configuration.nix
          sops-nix.nixosModules.sops
          codex-responses-proxy.nixosModules.default
          (
            { config, ... }:
            {
              # made by `sops secrets/secrets.yaml`, its openai-api-key the bare key; the machine's SSH key opens it
              sops = {
                defaultSopsFile = ./secrets/secrets.yaml;
                # a new key takes effect with the next switch
                secrets.openai-api-key.restartUnits = [ "codex-responses-proxy.service" ];
              };
              services.openssh.enable = true;

              services.codex-responses-proxy = {
                enable = true;
                keyFile = config.sops.secrets.openai-api-key.path;
                codexConfig.enable = true;
                # Codex sends only what is new with each turn
                websocket = true;
              };

              system.stateVersion = "26.05";
            }
          )
        ];
      };
    };
}
