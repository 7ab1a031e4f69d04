# A machine that runs Codex with a key from agenix. `nix flake check` of the project evaluates this file with
# stand-ins for agenix's options; `examples/nixos/check` evaluates it with the real module.
{
  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    agenix = {
      url = "github:ryantm/agenix";
      inputs.nixpkgs.follows = "nixpkgs";
    };
    codex-responses-proxy = {
      # OWNER: a copy of the project that you trust with your key, such as your own fork
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
        modules = [
          # in addition to the machine's own ./configuration.nix
          agenix.nixosModules.default
          codex-responses-proxy.nixosModules.default
          (
            { config, ... }:
            let
              secret = config.age.secrets.openai-api-key;
            in
            {
              # The key and nothing else, made by `agenix -e secrets/openai-api-key.age`; the machine's SSH key decrypts it.
              age.secrets.openai-api-key.file = ./secrets/openai-api-key.age;
              services.openssh.enable = true;

              services.codex-responses-proxy = {
                enable = true;
                keyFile = secret.path;
                codexConfig.enable = true;
                # Codex keeps a connection and sends only the new items of each turn
                websocket = true;
              };
              # A new key takes effect with the next switch.
              systemd.services.codex-responses-proxy.restartTriggers = [ secret.file ];

              nixpkgs.hostPlatform = "x86_64-linux";
              system.stateVersion = "26.05";
            }
          )
        ];
      };
    };
}
