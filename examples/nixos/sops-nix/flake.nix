# A machine that runs Codex with a key from sops-nix. `nix flake check` of the project evaluates this file with
# stand-ins for sops-nix's options; `examples/nixos/check` evaluates it with the real module.
{
  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    sops-nix = {
      url = "github:Mic92/sops-nix";
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
      sops-nix,
      codex-responses-proxy,
      ...
    }:
    {
      nixosConfigurations.machine = nixpkgs.lib.nixosSystem {
        modules = [
          # in addition to the machine's own ./configuration.nix
          sops-nix.nixosModules.sops
          codex-responses-proxy.nixosModules.default
          (
            { config, ... }:
            let
              secret = config.sops.secrets.openai-api-key;
            in
            {
              # Made by `sops secrets/openai-api-key.yaml`, with the key under `openai-api-key`; the machine's SSH key
              # decrypts it. A file of its own: a change of any secret in it restarts the service.
              sops.secrets.openai-api-key.sopsFile = ./secrets/openai-api-key.yaml;
              services.openssh.enable = true;

              services.codex-responses-proxy = {
                enable = true;
                keyFile = secret.path;
                codexConfig.enable = true;
                # Codex keeps a connection and sends only the new items of each turn
                websocket = true;
              };
              # A new key takes effect with the next switch.
              systemd.services.codex-responses-proxy.restartTriggers = [ secret.sopsFile ];

              nixpkgs.hostPlatform = "x86_64-linux";
              system.stateVersion = "26.05";
            }
          )
        ];
      };
    };
}
