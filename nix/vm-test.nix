# A NixOS machine: a key that its users can use and not see. Says for NixOS what tests/systemd says for systemd.
{ self }:
{ lib, pkgs, ... }:
let
  key = "sk-first-key-of-the-vm-test";
  secondKey = "sk-second-key-of-the-vm-test";

  # Answers every request with events 100 ms apart, and keeps the keys it was sent.
  upstream = pkgs.writers.writePython3 "upstream" { doCheck = false; } ''
    import http.server
    import ssl
    import time


    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            with open("/run/upstream/keys", "a") as keys:
                keys.write(self.headers["authorization"] + "\n")
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for number in range(5):
                event = b"data: %d\n\n" % number
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                time.sleep(0.1)
            self.wfile.write(b"0\r\n\r\n")


    server = http.server.ThreadingHTTPServer(("127.0.0.1", 443), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("/run/upstream/certificate.pem", "/run/upstream/key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()
  '';

  settings = {
    enable = true;
    keyFile = "/run/secrets/openai-api-key";
    upstreamUrl = "https://upstream.test/v1/responses";
    upstreamCaFile = "/run/upstream/ca.pem";
    codexConfig.enable = true;
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
    ];
    networking.hosts."127.0.0.1" = [ "upstream.test" ];

    # its certificate is made anew in each run
    systemd.services.upstream = {
      wantedBy = [ "multi-user.target" ];
      before = [ "codex-responses-proxy.service" ];
      path = [ pkgs.openssl ];
      preStart = ''
        cd /run/upstream
        new="openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        $new -subj /CN=ca.test -keyout ca-key.pem -out ca.pem
        $new -subj /CN=upstream.test -CA ca.pem -CAkey ca-key.pem -addext basicConstraints=CA:FALSE \
          -addext subjectAltName=DNS:upstream.test -keyout key.pem -out certificate.pem
        chmod 0644 ca.pem
      '';
      serviceConfig = {
        ExecStart = upstream;
        RuntimeDirectory = "upstream";
        RuntimeDirectoryPreserve = true;
        Type = "simple";
      };
    };

    services.codex-responses-proxy = settings;

    # other configurations to switch to
    specialisation = {
      other-port.configuration.services.codex-responses-proxy.port = 8400;
      restricted.configuration.services.codex-responses-proxy.allowedUsers = [
        "alice"
        "@developers"
      ];
    };
  };

  testScript = ''
    SERVICE = "codex-responses-proxy.service"
    SOCKET = "codex-responses-proxy.socket"
    KEY_FILE = "${settings.keyFile}"


    def write_key(key):
        machine.succeed(
            f"mkdir -p -m 0711 /run/secrets; umask 377; echo {key} >{KEY_FILE}.new; mv -f {KEY_FILE}.new {KEY_FILE}"
        )


    def post(user, port=8399):
        return machine.succeed(
            f"runuser -u {user} -- curl -s -o /dev/null -w '%{{http_code}}' --max-time 60 "
            f"--json '{{}}' http://127.0.0.1:{port}/v1/responses || true"
        )


    def last_key():
        return machine.succeed("tail -n 1 /run/upstream/keys").strip()


    def exposure():
        return float(machine.succeed(
            f"systemd-analyze security --no-pager {SERVICE} | sed -n 's/.*: \\([0-9.]*\\) .*/\\1/p' | tail -n 1"
        ))


    def switch(specialisation):
        machine.succeed(f"/run/booted-system{specialisation}/bin/switch-to-configuration test >&2")


    with subtest("a missing key shows at boot and heals by itself"):
        machine.wait_for_unit("upstream.service")
        machine.wait_for_unit(SOCKET)
        machine.wait_until_succeeds(f"systemctl show -P Result {SERVICE} | grep exit-code")
        machine.wait_until_succeeds(f"systemctl show -P ExecMainStatus {SERVICE} | grep 208")
        machine.fail(
            "runuser -u bob -- ${lib.getExe pkgs.python3} -c "
            "'import socket; socket.create_server((\"127.0.0.1\", 8399))'"
        )
        write_key("${key}")
        machine.wait_for_unit(SERVICE, timeout=30)

    with subtest("an answer streams through, with the key"):
        events = machine.succeed(
            "runuser -u alice -- curl -sN --json '{}' http://127.0.0.1:8399/v1/responses "
            "| while read -r line; do [ -z \"$line\" ] || date +%s%N; done"
        ).split()
        assert len(events) == 5 and int(events[4]) - int(events[0]) > 200_000_000, events
        assert last_key() == "Bearer ${key}"
        assert post("bob") == "200"

    with subtest("nobody can get at the key"):
        pid = machine.succeed(f"systemctl show -P MainPID {SERVICE}").strip()
        uid = machine.succeed(f"stat -c %u /proc/{pid}").strip()
        for who in [
            "runuser -u alice --",
            "runuser -u bob --",
            f"setpriv --reuid {uid} --regid {uid} --clear-groups",
        ]:
            machine.fail(f"{who} cat {KEY_FILE}")
            for file in ["mem", "maps", "environ", "fd/0"]:
                machine.fail(f"{who} head -c 1 /proc/{pid}/{file}")
        machine.succeed(f"[ $(readlink /proc/{pid}/fd/0) = /dev/null ]")
        machine.succeed("journalctl --sync")
        machine.fail(f"{{ journalctl -o export; systemctl show {SERVICE} {SOCKET}; }} | grep -aF ${key}")

    with subtest("the exposure is bounded"):
        assert exposure() <= 1.1, exposure()

    with subtest("a restart refuses no connection, and takes the new key"):
        machine.succeed(
            "runuser -u alice -- bash -c 'while [ ! -e /tmp/stop ]; do "
            "curl -s -o /dev/null -w \"%{http_code}\\n\" --json {} http://127.0.0.1:8399/v1/responses; done' "
            ">/run/answers 2>&1 &"
        )
        write_key("${secondKey}")
        for _ in range(3):
            machine.succeed(f"systemctl restart {SERVICE}", "sleep 1")
        machine.succeed("touch /tmp/stop", "sleep 2")
        answers = machine.succeed("sort /run/answers | uniq -c").split()
        assert answers[1:] == ["200"] and int(answers[0]) > 3, answers
        assert last_key() == "Bearer ${secondKey}"

    with subtest("another port takes effect with a switch"):
        switch("/specialisation/other-port")
        assert post("alice", 8400) == "200"
        assert post("alice", 8399) == "000"
        assert "127.0.0.1:8400/v1" in machine.succeed("cat /etc/codex/config.toml")
        switch("")
        assert post("alice") == "200"

    with subtest("so do names"):
        switch("/specialisation/restricted")
        machine.wait_for_unit(SERVICE)
        assert post("alice") == "200"
        assert post("bob") == "403"
        assert post("carol") == "200"
        assert post("root") == "403"
        assert exposure() <= 1.3, exposure()

    with subtest("stopping the socket stops all"):
        machine.succeed(f"systemctl stop {SOCKET}")
        assert machine.succeed(f"systemctl show -P ActiveState {SERVICE}").strip() == "inactive"
        assert post("alice") == "000"
  '';
}
