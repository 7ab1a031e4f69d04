#!/usr/bin/env bash
# Tests the module's units on a machine with systemd: on Debian through ./run, on NixOS through nix/tests/vm.nix. Runs as
# root and prints one line for each check; exits with status 1 if one fails.
#
# CONFIGURE is a command that switches the machine to the configuration named by its argument: plain, other-port or
# restricted (see nix/tests/lib/scenarios.nix). Without it, the units in the directory `configurations` are installed. With
# UPSTREAM_TLS the stand-in upstream uses TLS as upstream.test, with a certificate issued by /run/upstream/ca.pem.
#
# A check that something is denied is followed by a control, marked "control:": the same action where it is allowed.
here=$(cd "$(dirname "$0")" && pwd)
umask 022
# a directory that users can read
mkdir -p /run/machine-test/seen && cp "$here"/*.py /run/machine-test/ && cd /run/machine-test || exit 1

service=codex-responses-proxy.service
socket=codex-responses-proxy.socket
key_file=/run/secrets/openai-api-key
key=sk-first-key-of-the-machine-test
second_key=sk-second-key-of-the-machine-test
passed=0 failed=0

ok() { passed=$((passed + 1)) && echo "ok    $*"; }
not_ok() { failed=$((failed + 1)) && echo "NOT OK $*"; }
# check WHAT COMMAND…
check() {
  local what=$1 output
  shift
  if output=$("$@" 2>&1); then
    ok "$what"
  else
    not_ok "$what"
    printf "%s\n" "$output" | head -n 20 | sed "s|^|         |"
  fi
}
part() { echo "# $* (at $SECONDS s)"; }
not() { ! "$@"; }
equal() { [ "$1" = "$2" ] || { echo "$1 is not $2" && false; }; }
# within SECONDS COMMAND…: until it succeeds
within() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { "$@" && return; return 1; }
    sleep 0.2
  done
}
property() { systemctl show --property "$1" --value "${2:-$service}"; }
has() { equal "$(property "$1" "${3:-$service}")" "$2"; }
as() { runuser -u "$1" -- "${@:2}"; }
says() { journalctl --sync && journalctl --no-pager --unit $service | grep --quiet --fixed-strings "$1"; }
write_key() { (umask 377 && mkdir -p -m 0711 /run/secrets && printf '%s\n' "$1" >$key_file.new && mv -f $key_file.new $key_file); }
configure() {
  [ -z "${CONFIGURE:-}" ] || { $CONFIGURE "$1"; return; }
  local from=$here/configurations/$1/etc/systemd/system name changed=()
  for name in codex-responses-proxy-port.service $service; do
    cmp --quiet "$from/$name" "/etc/systemd/system/$name" || changed+=("$name")
  done
  cp -a "$here/configurations/$1/." / && systemctl daemon-reload
  # as a NixOS switch does: the socket requires the first
  [ ${#changed[@]} = 0 ] || systemctl restart "${changed[@]}"
}
# request USER PORT JSON [FLAG…]
request() { as "$1" curl --silent --max-time 120 --json "$3" "${@:4}" "http://127.0.0.1:$2/v1/responses"; }
# post USER [PORT]: the status of one request
post() { request "$1" "${2:-8399}" '{"events": 2, "pause": 0.01}' --output /dev/null --write-out '%{http_code}\n'; }
serves() { equal "$(post "$@")" 200; }
denies() { equal "$(post "$@")" 403; }
# websocket USER [HOLD]: the reply to a message over a WebSocket, or the status of its handshake
websocket() { as "$1" python3 websocket.py 8399 "${@:2}"; }
last_key() { tail -n 1 /run/upstream.keys; }
# listens USER PORT: whether the user can listen on the port
listens() { as "$1" python3 -c "import socket; socket.create_server(('127.0.0.1', $2))"; }
# counts PROCESS TEXT [COMMAND…]: how often the text is in a process's memory, as seen by the command's user
counts() { "${@:3}" python3 memory.py "$1" <<<"$2"; }
# hardened MAX: the units are valid, and their exposure is at most MAX
hardened() {
  local exposure
  check "systemd-analyze verify accepts the units" \
    systemd-analyze verify --man=no --recursive-errors=no /etc/systemd/system/codex-responses-proxy{.service,.socket,-port.service}
  exposure=$(systemd-analyze security --no-pager $service | sed -n 's/.*: \([0-9.]*\) .*/\1/p' | tail -n 1)
  check "exposure, $exposure, is at most $1" jq --exit-status --null-input "($exposure) <= $1"
}

systemctl --version | head -n 1
certificate=()
if [ -n "${UPSTREAM_TLS:-}" ]; then
  new=(openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2)
  (mkdir -p /run/upstream && cd /run/upstream &&
    "${new[@]}" -subj /CN=ca.test -keyout ca-key.pem -out ca.pem &&
    "${new[@]}" -subj /CN=upstream.test -CA ca.pem -CAkey ca-key.pem -addext basicConstraints=CA:FALSE \
      -addext subjectAltName=DNS:upstream.test -keyout key.pem -out certificate.pem) 2>/dev/null || exit 1
  certificate=(/run/upstream/certificate.pem /run/upstream/key.pem)
fi
python3 upstream.py "${certificate[@]}" &
trap 'kill $(jobs -p)' EXIT

part "no key"
if [ -z "${CONFIGURE:-}" ]; then
  # the state of NixOS after a boot
  cp -a "$here/configurations/plain/." / && systemctl daemon-reload
  systemctl --quiet enable $service $socket
  systemctl start --no-block $service
fi
check "the service fails" within 60 has Result exit-code
check "with the status for stdin" within 20 has ExecMainStatus 208
check "and the reason in the journal" says 'standard input: No such file or directory'
check "systemd retries" within 20 has SubState auto-restart
first=$(property RestartUSecNext)
check "with growing delays" within 120 not has RestartUSecNext "$first"
check "systemd holds the port" has ActiveState active $socket
check "no other user can take it" not listens bob 8399
check "control: another port" listens bob 8398
post alice >/run/waiting &
waiting=$!
connected() { ss --no-header --tcp --numeric state established 'dport = :8399' | grep --quiet 127.0.0.1; }
check "a request waits" within 20 connected
knock='import socket
for _ in range(60):
    socket.create_connection(("127.0.0.1", 8399)).close()'
check "60 connections are accepted" as bob python3 -c "$knock"
check "systemd still holds the port" has ActiveState active $socket
check "systemd still retries" has ActiveState activating
write_key $key
check "the service starts once the key exists" within 120 has ActiveState active
wait $waiting
check "the waiting request gets a response" equal "$(cat /run/waiting)" 200

part "a key, and a request"
check "alice gets a response" serves alice
check "with the key" equal "$(last_key)" "Bearer $key"
streams() {
  request alice 8399 '{"events": 5, "seen": "/run/machine-test/seen"}' --no-buffer | {
    seen=0
    while read -r line; do [ -z "$line" ] || touch seen/$((++seen)); done
    equal $seen 5
  }
}
check "events arrive as they are sent" streams
check "another path is rejected" equal \
  "$(curl --silent --output /dev/null --write-out '%{http_code}' http://127.0.0.1:8399/v1/models)" 403
check "a WebSocket handshake is rejected by default" equal "$(websocket alice)" 403
if [ -e /etc/codex/config.toml ]; then
  check "Codex is configured with the port" grep --quiet --fixed-strings 127.0.0.1:8399/v1 /etc/codex/config.toml
fi
hardened 1.1
broken=/run/codex-broken.service
printf '[Service]\nExecStart=/bin/sh\nNoSuchSetting=yes\n' >$broken
check "control: systemd-analyze rejects a wrong unit" not systemd-analyze verify --man=no --recursive-errors=no $broken

part "access to the key"
process=$(property MainPID)
uid=$(stat --format %u "/proc/$process")
gid=$(stat --format %g "/proc/$process")
check "the service has a user of its own" test "$uid" -ge 61184
as_service() { setpriv --reuid "$uid" --regid "$gid" --clear-groups "$@"; }
inside() { nsenter --target "$process" --mount --root -- "$@"; }
for _ in $(seq 20); do post alice; done >/dev/null
check "root finds the key in the process's memory once" equal "$(counts "$process" $key)" 1
opens() { "$@" cat $key_file; }
# readable PROCESS COMMAND…: the files of a process that the command's user can read
readable() { "${@:2}" bash -c "cd /proc/$1 && for f in maps environ auxv stack syscall fd/0 map_files/*; do head -c 1 \$f >/dev/null && echo \$f; done; : <mem && echo mem" 2>/dev/null; }
reads_own() { readable self "$@" | grep --quiet environ; }
check "root can open the key file" opens env
check "and read the process" equal "$(readable "$process" env | grep --extended-regexp --count '^(mem|maps|environ|fd/0)$')" 4
# is_denied NAME COMMAND…: checks that the command's user cannot get at the key
is_denied() {
  check "$1 can't open the key file" not opens "${@:2}"
  check "control: another file" "${@:2}" head -c 1 /etc/passwd
  check "$1 can't read the process" equal "$(readable "$process" "${@:2}")" ""
  check "control: its own process" reads_own "${@:2}"
  check "$1 finds no key in its memory" not counts "$process" $key "${@:2}"
  check "control: the key in its own memory" test "$(counts self $key "${@:2}")" -ge 1
}
is_denied alice as alice
is_denied bob as bob
is_denied "the service's user" as_service
# in the mount namespace of the service, as its user
within_mounts() { inside setpriv --reuid "$uid" --regid "$gid" --clear-groups "$@"; }
check "its user can't open the key file in its mount namespace" not opens within_mounts
check "control: another file" within_mounts head -c 1 /etc/passwd
check "stdin is /dev/null" equal "$(readlink "/proc/$process/fd/0")" /dev/null
check "it has no capabilities" equal "$(sed -n 's/^CapEff:\t//p' "/proc/$process/status")" 0000000000000000
check "it has a system call filter" equal "$(sed -n 's/^Seccomp:\t//p' "/proc/$process/status")" 2
check "it is never swapped" has MemorySwapMax 0
# mentioned TEXT: in the journal, a property, a unit or /etc/codex
mentioned() {
  journalctl --sync
  { journalctl --no-pager --output export; systemctl show --all $service $socket; cat /etc/systemd/system/codex-* /etc/codex/*; } 2>/dev/null |
    grep --text --fixed-strings --max-count 1 -- "$1"
}
check "the key is in no journal, property or unit" not mentioned $key
check "control: the request is in the journal" mentioned status=200
check "control: the properties" mentioned MemorySwapMax=0
check "control: the units" mentioned "StandardInput=file:$key_file"

part "restarts under load, and a new key"
rm -f /run/load.* && touch /run/load.whole && chown alice /run/load.whole
as alice python3 load.py 8399 >/run/load.json 2>/run/load.err &
load=$!
# more COUNT: waits for that many further responses
grown() { [ "$(stat --format %s /run/load.whole)" -ge "$1" ]; }
more() { within 60 grown $(($(stat --format %s /run/load.whole) + $1)); }
check "requests succeed" more 20
for _ in 1 2 3 4; do
  check "a restart" systemctl restart $service
  check "requests succeed" more 20
done
write_key $second_key
check "a restart" systemctl restart $service
check "requests succeed" more 20
touch /run/load.stop
wait $load
echo "      $(cat /run/load.json /run/load.err)"
check "no request is rejected or lost" jq --exit-status '.failed == 0 and .whole >= 120' /run/load.json
check "alice gets a response" serves alice
check "with the new key" equal "$(last_key)" "Bearer $second_key"
process=$(property MainPID)
check "root finds it once" equal "$(counts "$process" $second_key)" 1
check "and the old key not at all" equal "$(counts "$process" $key)" 0

part "an invalid key"
write_key 'not a key'
systemctl restart --no-block $service
check "the service fails" within 20 has SubState auto-restart
check "with status 1" has ExecMainStatus 1
check "and the input is in no log" not mentioned 'not a key'
write_key $key
check "a valid key starts it" within 120 has ActiveState active

part "stopping"
check "alice gets a response" serves alice
check "the socket stops" systemctl stop $socket
check "and the service with it" has ActiveState inactive
check "connections are refused" not post alice
check "the socket alone starts" systemctl start $socket
check "without the service" has ActiveState inactive
check "a request starts the service" serves alice
check "the service stops" systemctl stop $service
check "and starts with its socket" bash -c "systemctl stop $socket && systemctl start $service"
check "alice gets a response" serves alice

part "secrets installed by a unit"
cat >/run/systemd/system/agenix-install-secrets.service <<UNIT
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
RemainAfterExit=yes
Environment=PATH=$PATH
ExecStart=$(command -v bash) $PWD/install-secrets
UNIT
# install KEY: sets what that unit does once /run/install-secrets exists
install() {
  rm -f /run/install-secrets
  cat >install-secrets <<SCRIPT
until [ -e /run/install-secrets ]; do sleep 0.1; done
umask 377
echo $1 >$key_file.new && mv -f $key_file.new $key_file
SCRIPT
}
install $key
systemctl stop $socket $service
rm -f $key_file
systemctl daemon-reload
systemctl start --no-block $service
check "a start waits for the unit" within 20 eval "systemctl list-jobs | grep --quiet '$service.*waiting'"
check "that is activating" has ActiveState activating agenix-install-secrets.service
touch /run/install-secrets
check "it starts once the key is installed" within 60 has ActiveState active
check "without a retry" has NRestarts 0
check "and serves requests" serves alice
install $second_key
systemctl stop agenix-install-secrets.service
check "it doesn't stop with that unit" has ActiveState active
systemctl restart --no-block $service
check "a restart waits for the unit" within 20 has ActiveState activating agenix-install-secrets.service
touch /run/install-secrets
serves_with_second_key() { serves alice && equal "$(last_key)" "Bearer $second_key"; }
check "the new key is used" within 60 serves_with_second_key
systemctl stop agenix-install-secrets.service
rm /run/systemd/system/agenix-install-secrets.service
systemctl daemon-reload

part "another port"
check "a switch to it" configure other-port
check "alice gets a response there" within 20 serves alice 8400
check "and none on the old port" not post alice 8399
check "the service is up" within 20 has ActiveState active
hardened 1.1
if [ -e /etc/codex/config.toml ]; then
  check "Codex is configured with the new port" grep --quiet --fixed-strings 127.0.0.1:8400/v1 /etc/codex/config.toml
fi
check "a switch back" configure plain
check "alice gets a response on the old port" within 20 serves alice

part "allowed users"
getent group developers >/dev/null || groupadd developers
id carol >/dev/null 2>&1 || useradd --create-home --groups developers carol
check "a switch to allowed users" configure restricted
check "the service is up" within 20 has ActiveState active
hardened 1.3
check "alice gets a response" serves alice
check "bob is denied" denies bob
check "carol in group developers gets a response" serves carol
check "root is denied" denies root
check "the journal names bob's uid" says "uid=$(id -u bob)"
check "alice opens a WebSocket" equal "$(websocket alice)" hello
check "with the key" equal "$(last_key)" "Bearer $second_key"
check "bob's handshake is denied" equal "$(websocket bob)" 403
touch hold
websocket alice hold >/run/websocket &
holder=$!
check "a WebSocket stays open" within 20 grep --quiet hello /run/websocket
check "root finds the key once while it is open" equal "$(counts "$(property MainPID)" $second_key)" 1
rm hold
wait $holder
check "and closes" equal $? 0
shutdown() { as "$1" curl --silent --output /dev/null --write-out '%{http_code}' http://127.0.0.1:8399/shutdown; }
check "bob can't stop it" equal "$(shutdown bob)" 403
usermod --append --groups developers bob
# group membership is cached for a second
check "bob gets a response once he is in group developers" within 10 serves bob
check "alice can stop it" equal "$(shutdown alice)" 200
check "it exits successfully" within 40 has Result success
check "and is not restarted" within 40 has ActiveState inactive
check "the next request starts it" serves alice
mkdir -p /run/systemd/system/$service.d
printf '[Service]\nExecStart=\nExecStart=%s "--allow-user" "nobody-by-this-name"\n' \
  "$(sed -n 's/^ExecStart=//p' /etc/systemd/system/$service)" >/run/systemd/system/$service.d/unknown.conf
systemctl daemon-reload
systemctl restart --no-block $service
check "an unknown user fails the start" within 20 has SubState auto-restart
check "and is named in the journal" says nobody-by-this-name
systemctl stop $socket

part "the program started by root, without systemd"
program=$(sed -n 's/^ExecStart="\([^"]*\)".*/\1/p' /etc/systemd/system/$service)
upstream=(--upstream-url http://127.0.0.1:9001/v1/responses)
[ -z "${UPSTREAM_TLS:-}" ] ||
  upstream=(--upstream-url https://upstream.test:9001/v1/responses --upstream-ca /run/upstream/ca.pem)
printf '%s\n' $key | "$program" --port 8402 "${upstream[@]}" 2>/run/root.log &
process=$!
check "alice's request succeeds" within 20 serves alice 8402
check "with the key" equal "$(last_key)" "Bearer $key"
# id_of KIND: the id of that kind, if real, effective, saved and filesystem id are the same
id_of() { sed -n "s/^$1:\t\([0-9]*\)\t\1\t\1\t\1\$/\1/p" "/proc/$process/status"; }
check "it runs as an unused user" test "$(id_of Uid)" -ge $((0x70000000))
check "and an unused group" test "$(id_of Gid)" -ge $((0x70000000))
check "root finds the key in its memory once" equal "$(counts $process $key)" 1
kill $process
wait $process
check "it exits with status 0" equal $? 0

echo "$passed passed, $failed failed"
[ $failed = 0 ]
