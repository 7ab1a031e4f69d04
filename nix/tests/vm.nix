# NixOS VM test: runs tests/systemd with the module, plus switching between configurations, TLS by host name, and a key
# that is decrypted at activation.
{ self }:
{ lib, pkgs, ... }:
let
  scripts = lib.fileset.toSource {
    root = ../../tests/systemd;
    fileset = ../../tests/systemd;
  };
in
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

    # other scenarios to switch to
    specialisation = lib.mapAttrs (_: settings: {
      configuration.services.codex-responses-proxy = settings;
    }) (removeAttrs (import ./lib/scenarios.nix) [ "plain" ]);
  };

  # A machine whose SSH host key decrypts the OpenAI key at activation, as agenix does it.
  nodes.age = {
    imports = [ self.nixosModules.default ];

    services.openssh.enable = true;
    environment.systemPackages = [ pkgs.age ];
    system.activationScripts.decrypt.text = ''
      if [ -e /etc/openai-api-key.age ]; then
        mkdir -p -m 0751 /run/agenix
        (umask 377; ${lib.getExe pkgs.age} --decrypt --identity /etc/ssh/ssh_host_ed25519_key \
          --output /run/agenix/openai-api-key /etc/openai-api-key.age)
      fi
    '';

    systemd.services.upstream = {
      wantedBy = [ "multi-user.target" ];
      script = "${lib.getExe pkgs.python3} ${scripts}/upstream.py";
    };
    services.codex-responses-proxy = {
      enable = true;
      keyFile = "/run/agenix/openai-api-key";
      upstreamUrl = "http://127.0.0.1:9001/v1/responses";
    };
  };

  testScript =
    let
      configure = pkgs.writeShellScript "configure" ''
        [ "$1" = plain ] && system=/run/booted-system || system=/run/booted-system/specialisation/$1
        exec $system/bin/switch-to-configuration test
      '';
    in
    ''
      start_all()
      machine.wait_for_unit("codex-responses-proxy.socket")
      machine.succeed("CONFIGURE=${configure} UPSTREAM_TLS=yes bash ${scripts}/test.sh >&2", timeout=1800)
      tables = "import tomllib; print(tomllib.load(open('/etc/codex/config.toml', 'rb'))['model_providers'])"
      assert "codex-responses-proxy" in machine.succeed(f'python3 -c "{tables}"')

      age.wait_for_file("/etc/ssh/ssh_host_ed25519_key.pub")
      age.succeed(
          "echo sk-out-of-an-age-file |"
          " age --recipients-file /etc/ssh/ssh_host_ed25519_key.pub --output /etc/openai-api-key.age"
      )
      age.shutdown()
      age.wait_for_unit("codex-responses-proxy.service")
      age.wait_for_open_port(9001, "127.0.0.1")
      age.succeed("curl --fail --silent --json '{}' http://127.0.0.1:8399/v1/responses | grep '1 of 1'")
      age.succeed("grep --line-regexp 'Bearer sk-out-of-an-age-file' /run/upstream.keys")
      age.succeed("[ \"$(systemctl show --property NRestarts --value codex-responses-proxy)\" = 0 ]")
    '';
}
