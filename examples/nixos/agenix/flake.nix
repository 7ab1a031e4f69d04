# A machine that runs Codex from an agenix secret. `nix flake check` of the project evaluates this file with
# stand-ins for agenix's options; against agenix's own module, in this folder:
#
#   nix eval --no-write-lock-file --override-input codex-responses-proxy ../../.. \
#     --raw '.#nixosConfigurations.machine.config.systemd.units."codex-responses-proxy.service".text'
{
  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    agenix = {
      url = "github:ryantm/agenix";
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
      agenix,
      codex-responses-proxy,
      ...
    }:
    {
      nixosConfigurations.machine = nixpkgs.lib.nixosSystem {
        system = "x86_64-linux";
        modules = [
          # beside the machine's own ./configuration.nix
          agenix.nixosModules.default
          codex-responses-proxy.nixosModules.default
          (
            { config, ... }:
            let
              secret = config.age.secrets.openai-api-key;
            in
            {
              # the bare key, made by `agenix -e secrets/openai-api-key.age`; the machine's SSH key opens it
              age.secrets.openai-api-key.file = ./secrets/openai-api-key.age;
              services.openssh.enable = true;

              services.codex-responses-proxy = {
                enable = true;
                keyFile = secret.path;
                codexConfig.enable = true;
                # Codex sends only what is new with each turn
                websocket = true;
              };
              # a new key takes effect with the next switch
              systemd.services.codex-responses-proxy.restartTriggers = [ secret.file ];

              system.stateVersion = "26.05";
            }
          )
        ];
      };
    };
}
