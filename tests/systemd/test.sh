#!/usr/bin/env bash
# What the module's units promise, shown on a machine that runs them: under Debian's systemd by ./run, on NixOS by
# nix/tests/vm.nix. Runs as root; one line for each thing shown, status 1 if one is not.
#
# CONFIGURE is a command that switches the machine to the configuration named by its argument: plain, other-port or
# restricted (see nix/tests/lib/scenarios.nix). Without it, the units in the folder configurations are installed. With UPSTREAM_TLS
# the stand-in upstream speaks TLS, as upstream.test, with a certificate by /run/upstream/ca.pem.
#
# What can't be done is done beside it where it can: the lines that say "but".
here=$(cd "$(dirname "$0")" && pwd)
umask 022
# where users can read
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
  # as a switch of NixOS does: the socket hangs on the first
  [ ${#changed[@]} = 0 ] || systemctl restart "${changed[@]}"
}
# request USER PORT JSON [FLAG…]
request() { as "$1" curl --silent --max-time 120 --json "$3" "${@:4}" "http://127.0.0.1:$2/v1/responses"; }
# post USER [PORT]: the status of one request
post() { request "$1" "${2:-8399}" '{"events": 2, "pause": 0.01}' --output /dev/null --write-out '%{http_code}\n'; }
answers() { equal "$(post "$@")" 200; }
refuses() { equal "$(post "$@")" 403; }
# websocket USER [HOLD]: the reply to a message over a WebSocket, or the status of its handshake
websocket() { as "$1" python3 websocket.py 8399 "${@:2}"; }
last_key() { tail -n 1 /run/upstream.keys; }
# listens USER PORT: whether the user can take the port
listens() { as "$1" python3 -c "import socket; socket.create_server(('127.0.0.1', $2))"; }
# counts PROCESS TEXT [COMMAND…]: how often the text is in a process's memory, in the eyes of who runs the command
counts() { "${@:3}" python3 memory.py "$1" <<<"$2"; }
# the units are right, and as closed as promised
closed() {
  local exposure
  check "systemd has nothing to say against the units" \
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

part "no key yet"
if [ -z "${CONFIGURE:-}" ]; then
  # as NixOS has it after a boot
  cp -a "$here/configurations/plain/." / && systemctl daemon-reload
  systemctl --quiet enable $service $socket
  systemctl start --no-block $service
fi
check "the service fails" within 60 has Result exit-code
check "with the reason in its properties" within 20 has ExecMainStatus 208
check "and in the journal" says 'standard input: No such file or directory'
check "it is tried again" within 20 has SubState auto-restart
first=$(property RestartUSecNext)
check "after a longer while each time" within 120 not has RestartUSecNext "$first"
check "systemd holds the port" has ActiveState active $socket
check "nobody else can take it" not listens bob 8399
check "but another" listens bob 8398
post alice >/run/waiting &
waiting=$!
connected() { ss --no-header --tcp --numeric state established 'dport = :8399' | grep --quiet 127.0.0.1; }
check "a request waits" within 20 connected
knock='import socket
for _ in range(60):
    socket.create_connection(("127.0.0.1", 8399)).close()'
check "60 connections come" as bob python3 -c "$knock"
check "systemd still holds the port" has ActiveState active $socket
check "the service is still tried" has ActiveState activating
write_key $key
check "once the key is there it serves" within 120 has ActiveState active
wait $waiting
check "whoever waited is answered" equal "$(cat /run/waiting)" 200

part "a key, and a request"
check "alice is answered" answers alice
check "with the key" equal "$(last_key)" "Bearer $key"
streams() {
  request alice 8399 '{"events": 5, "seen": "/run/machine-test/seen"}' --no-buffer | {
    seen=0
    while read -r line; do [ -z "$line" ] || touch seen/$((++seen)); done
    equal $seen 5
  }
}
check "events come as they are sent" streams
check "anything else is refused" equal \
  "$(curl --silent --output /dev/null --write-out '%{http_code}' http://127.0.0.1:8399/v1/models)" 403
check "a WebSocket handshake is rejected by default" equal "$(websocket alice)" 403
if [ -e /etc/codex/config.toml ]; then
  check "Codex is led here" grep --quiet --fixed-strings 127.0.0.1:8399/v1 /etc/codex/config.toml
fi
closed 1.1
broken=/run/codex-broken.service
printf '[Service]\nExecStart=/bin/sh\nNoSuchSetting=yes\n' >$broken
check "but against a wrong unit it has" not systemd-analyze verify --man=no --recursive-errors=no $broken

part "who can get at the key"
process=$(property MainPID)
uid=$(stat --format %u "/proc/$process")
gid=$(stat --format %g "/proc/$process")
check "the service has a user of its own" test "$uid" -ge 61184
as_service() { setpriv --reuid "$uid" --regid "$gid" --clear-groups "$@"; }
inside() { nsenter --target "$process" --mount --root -- "$@"; }
for _ in $(seq 20); do post alice; done >/dev/null
check "root finds the key in the process's memory once" equal "$(counts "$process" $key)" 1
opens() { "$@" cat $key_file; }
# readable PROCESS COMMAND…: what of a process can be read by who runs the command
readable() { "${@:2}" bash -c "cd /proc/$1 && for f in maps environ auxv stack syscall fd/0 map_files/*; do head -c 1 \$f >/dev/null && echo \$f; done; : <mem && echo mem" 2>/dev/null; }
reads_own() { readable self "$@" | grep --quiet environ; }
check "root can open the key file" opens env
check "and read the process" equal "$(readable "$process" env | grep --extended-regexp --count '^(mem|maps|environ|fd/0)$')" 4
# kept_out WHO COMMAND…
kept_out() {
  check "$1 can't open the key file" not opens "${@:2}"
  check "but another" "${@:2}" head -c 1 /etc/passwd
  check "$1 can't read the process" equal "$(readable "$process" "${@:2}")" ""
  check "but its own" reads_own "${@:2}"
  check "$1 finds no key in its memory" not counts "$process" $key "${@:2}"
  check "but in its own" test "$(counts self $key "${@:2}")" -ge 1
}
kept_out alice as alice
kept_out bob as bob
kept_out "the service's user" as_service
# where the service is, with its user
within_mounts() { inside setpriv --reuid "$uid" --regid "$gid" --clear-groups "$@"; }
check "its user can't open the key file from inside its mounts" not opens within_mounts
check "but another" within_mounts head -c 1 /etc/passwd
check "the descriptor it was given is /dev/null by now" equal "$(readlink "/proc/$process/fd/0")" /dev/null
check "it holds no capability" equal "$(sed -n 's/^CapEff:\t//p' "/proc/$process/status")" 0000000000000000
check "it runs under a filter of system calls" equal "$(sed -n 's/^Seccomp:\t//p' "/proc/$process/status")" 2
check "no part of it is swapped" has MemorySwapMax 0
# mentioned TEXT: in the journal, a property, a unit or /etc/codex
mentioned() {
  journalctl --sync
  { journalctl --no-pager --output export; systemctl show --all $service $socket; cat /etc/systemd/system/codex-* /etc/codex/*; } 2>/dev/null |
    grep --text --fixed-strings --max-count 1 -- "$1"
}
check "the key is in no journal, property or unit" not mentioned $key
check "but the request is" mentioned status=200
check "the properties are" mentioned MemorySwapMax=0
check "and the units" mentioned "StandardInput=file:$key_file"

part "restarts under load, and another key"
rm -f /run/load.* && touch /run/load.whole && chown alice /run/load.whole
as alice python3 load.py 8399 >/run/load.json 2>/run/load.err &
load=$!
# more COUNT: so many more answers
grown() { [ "$(stat --format %s /run/load.whole)" -ge "$1" ]; }
more() { within 60 grown $(($(stat --format %s /run/load.whole) + $1)); }
check "requests are answered" more 20
for _ in 1 2 3 4; do
  check "a restart" systemctl restart $service
  check "requests are answered" more 20
done
write_key $second_key
check "a restart" systemctl restart $service
check "requests are answered" more 20
touch /run/load.stop
wait $load
echo "      $(cat /run/load.json /run/load.err)"
check "no request was refused or lost" jq --exit-status '.failed == 0 and .whole >= 120' /run/load.json
check "alice is answered" answers alice
check "with the new key" equal "$(last_key)" "Bearer $second_key"
process=$(property MainPID)
check "root finds it once" equal "$(counts "$process" $second_key)" 1
check "and no more of the first" equal "$(counts "$process" $key)" 0

part "a key that no account has the like of"
write_key 'not a key'
systemctl restart --no-block $service
check "the service fails" within 20 has SubState auto-restart
check "by its own word" has ExecMainStatus 1
check "and doesn't repeat it" not mentioned 'not a key'
write_key $key
check "a right one heals it" within 120 has ActiveState active

part "stopping"
check "alice is answered" answers alice
check "the socket stops" systemctl stop $socket
check "and the service with it" has ActiveState inactive
check "connections are refused" not post alice
check "the socket alone starts" systemctl start $socket
check "without the service" has ActiveState inactive
check "which a request starts" answers alice
check "the service stops" systemctl stop $service
check "and starts with its socket" bash -c "systemctl stop $socket && systemctl start $service"
check "alice is answered" answers alice

part "secrets that a unit installs"
cat >/run/systemd/system/agenix-install-secrets.service <<UNIT
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
RemainAfterExit=yes
Environment=PATH=$PATH
ExecStart=$(command -v bash) $PWD/install-secrets
UNIT
# install KEY: what that unit does, once it may
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
check "which is at it" has ActiveState activating agenix-install-secrets.service
touch /run/install-secrets
check "with the key there it starts" within 60 has ActiveState active
check "at once" has NRestarts 0
check "and serves" answers alice
install $second_key
systemctl stop agenix-install-secrets.service
check "it doesn't end with that unit" has ActiveState active
systemctl restart --no-block $service
check "a restart waits for the unit" within 20 has ActiveState activating agenix-install-secrets.service
touch /run/install-secrets
answers_with_second_key() { answers alice && equal "$(last_key)" "Bearer $second_key"; }
check "alice is answered with the new key" within 60 answers_with_second_key
systemctl stop agenix-install-secrets.service
rm /run/systemd/system/agenix-install-secrets.service
systemctl daemon-reload

part "another port"
check "a switch to it" configure other-port
check "alice is answered there" within 20 answers alice 8400
check "and not where she was" not post alice 8399
check "the service is up" within 20 has ActiveState active
closed 1.1
if [ -e /etc/codex/config.toml ]; then
  check "Codex is led there" grep --quiet --fixed-strings 127.0.0.1:8400/v1 /etc/codex/config.toml
fi
check "a switch back" configure plain
check "alice is answered where she was" within 20 answers alice

part "named users only"
getent group developers >/dev/null || groupadd developers
id carol >/dev/null 2>&1 || useradd --create-home --groups developers carol
check "a switch to them" configure restricted
check "the service is up" within 20 has ActiveState active
closed 1.3
check "alice is answered" answers alice
check "bob is refused" refuses bob
check "carol of the developers is answered" answers carol
check "root is refused" refuses root
check "the journal names bob's uid" says "uid=$(id -u bob)"
check "alice opens a WebSocket" equal "$(websocket alice)" hello
check "with the key" equal "$(last_key)" "Bearer $second_key"
check "bob's handshake is refused" equal "$(websocket bob)" 403
touch hold
websocket alice hold >/run/websocket &
holder=$!
check "a WebSocket stays open" within 20 grep --quiet hello /run/websocket
check "root finds the key once while it is open" equal "$(counts "$(property MainPID)" $second_key)" 1
rm hold
wait $holder
check "and closes" equal $? 0
shutdown() { as "$1" curl --silent --output /dev/null --write-out '%{http_code}' http://127.0.0.1:8399/shutdown; }
check "bob can't shut it down" equal "$(shutdown bob)" 403
usermod --append --groups developers bob
# what the group database says is relied on for a second
check "bob is answered once he is a developer" within 10 answers bob
check "alice can shut it down" equal "$(shutdown alice)" 200
check "it ends as a success" within 40 has Result success
check "and is not restarted" within 40 has ActiveState inactive
check "until the next request" answers alice
mkdir -p /run/systemd/system/$service.d
printf '[Service]\nExecStart=\nExecStart=%s "--allow-user" "nobody-by-this-name"\n' \
  "$(sed -n 's/^ExecStart=//p' /etc/systemd/system/$service)" >/run/systemd/system/$service.d/unknown.conf
systemctl daemon-reload
systemctl restart --no-block $service
check "an unknown name fails the start" within 20 has SubState auto-restart
check "and is named in the journal" says nobody-by-this-name
systemctl stop $socket

part "the program started by root, without systemd"
program=$(sed -n 's/^ExecStart="\([^"]*\)".*/\1/p' /etc/systemd/system/$service)
upstream=(--upstream-url http://127.0.0.1:9001/v1/responses)
[ -z "${UPSTREAM_TLS:-}" ] ||
  upstream=(--upstream-url https://upstream.test:9001/v1/responses --upstream-ca /run/upstream/ca.pem)
printf '%s\n' $key | "$program" --port 8402 "${upstream[@]}" 2>/run/root.log &
process=$!
check "alice's request succeeds" within 20 answers alice 8402
check "with the key" equal "$(last_key)" "Bearer $key"
# id_of KIND: the id of that kind, if real, effective, saved and filesystem id are the same
id_of() { sed -n "s/^$1:\t\([0-9]*\)\t\1\t\1\t\1\$/\1/p" "/proc/$process/status"; }
check "it runs as a user that nobody else is" test "$(id_of Uid)" -ge $((0x70000000))
check "and as such a group" test "$(id_of Gid)" -ge $((0x70000000))
check "root finds the key in its memory once" equal "$(counts $process $key)" 1
kill $process
wait $process
check "it exits with status 0" equal $? 0

echo "$passed passed, $failed failed"
[ $failed = 0 ]
