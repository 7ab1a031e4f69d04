# A NixOS machine: says for NixOS, its switches and its names over TLS what tests/systemd says for systemd.
{ self }:
{ lib, pkgs, ... }:
{
  name = "codex-responses-proxy";

  nodes.machine = {
    imports = [ self.nixosModules.default ];

    users.groups.developers = { };
    users.users = {
      alice.isNormalUser = true;
      bob.isNormalUser = true;
      carol = {
        isNormalUser = true;
        extraGroups = [ "developers" ];
      };
    };
    environment.systemPackages = [
      pkgs.curl
      pkgs.jq
      pkgs.openssl
      pkgs.python3
    ];
    networking.hosts."127.0.0.1" = [ "upstream.test" ];

    services.codex-responses-proxy = {
      enable = true;
      keyFile = "/run/secrets/openai-api-key";
      upstreamUrl = "https://upstream.test:9001/v1/responses";
      upstreamCaFile = "/run/upstream/ca.pem";
      codexConfig.enable = true;
    };

    # other configurations to switch to
    specialisation = lib.mapAttrs (_: settings: {
      configuration.services.codex-responses-proxy = settings;
    }) (removeAttrs (import ./configurations.nix) [ "plain" ]);
  };

  testScript =
    let
      configure = pkgs.writeShellScript "configure" ''
        [ "$1" = plain ] && system=/run/booted-system || system=/run/booted-system/specialisation/$1
        exec $system/bin/switch-to-configuration test
      '';
      shown = lib.fileset.toSource {
        root = ../tests/systemd;
        fileset = ../tests/systemd;
      };
    in
    ''
      machine.wait_for_unit("codex-responses-proxy.socket")
      machine.succeed("CONFIGURE=${configure} UPSTREAM_TLS=yes bash ${shown}/test.sh >&2", timeout=1800)
      tables = "import tomllib; print(tomllib.load(open('/etc/codex/config.toml', 'rb'))['model_providers'])"
      assert "codex-responses-proxy" in machine.succeed(f'python3 -c "{tables}"')
    '';
}
