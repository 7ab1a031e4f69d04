#!/usr/bin/env bash
# Runs as root on the machine; see run. One line for each thing shown; status 1 if one is not.
cd /root || exit 1
umask 022

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
    [ $SECONDS -lt $end ] || { "$@" && return || return 1; }
    sleep 0.2
  done
}
property() { systemctl show --property "$1" --value "${2:-$service}"; }
has() { equal "$(property "$1" "${3:-$service}")" "$2"; }
pid() { property MainPID; }
as() { runuser -u "$1" -- "${@:2}"; }
write_key() { (umask 377 && mkdir -p -m 0711 /run/secrets && printf '%s\n' "$1" >$key_file.new && mv -f $key_file.new $key_file); }
configure() {
  cp -a "configurations/$1/." /
  systemctl daemon-reload
}
# post USER [PORT]: the status of one request
post() {
  as "$1" curl --silent --max-time 120 --output /dev/null --write-out '%{http_code}\n' \
    --json '{"events": 2, "pause": 0.01}' "http://127.0.0.1:${2:-8399}/v1/responses"
}
answers() { equal "$(post "$@")" 200; }
refuses() { equal "$(post "$@")" 403; }
last_key() { tail -n 1 /run/upstream.keys; }
exposure() { systemd-analyze security --no-pager "$service" | sed -n 's/.*: \([0-9.]*\) .*/\1/p' | tail -n 1; }
at_most() { jq -en --argjson a "$1" --argjson b "$2" '$a <= $b' >/dev/null || { echo "$1 is more than $2" && false; }; }

systemctl --version | head -n 1
python3 upstream.py &
upstream=$!
trap 'kill $upstream' EXIT
cp -a configurations/plain/. /
systemctl daemon-reload
systemctl --quiet enable $service $socket

part "a key, and a request"
write_key $key
check "the key file is root's alone" equal "$(stat --format '%a %U' $key_file)" "400 root"
check "the service starts" systemctl start $service
check "it has said that it is ready" has ActiveState active
check "systemd holds the port" has ActiveState active $socket
check "alice is answered" answers alice
check "with the key" equal "$(last_key)" "Bearer $key"
streams() {
  as alice curl --silent --no-buffer --json '{"events": 5, "pause": 0.5}' http://127.0.0.1:8399/v1/responses |
    while read -r line; do [ -z "$line" ] || date +%s%N; done |
    { mapfile -t at && echo "${at[@]}" && [ ${#at[@]} = 5 ] && [ $((at[4] - at[0])) -gt 1500000000 ]; }
}
check "events come as they are sent" streams
check "anything else is refused" equal \
  "$(curl --silent --output /dev/null --write-out '%{http_code}' http://127.0.0.1:8399/v1/models)" 403
now=$(exposure)
check "exposure, $now, is at most 1.1" at_most "$now" 1.1

part "who can get at the key"
process=$(pid)
uid=$(stat --format %u "/proc/$process")
gid=$(stat --format %g "/proc/$process")
check "the service has a user of its own" test "$uid" -ge 61184
as_service() { setpriv --reuid "$uid" --regid "$gid" --clear-groups "$@"; }
inside() { nsenter --target "$process" --mount --root -- setpriv --reuid "$uid" --regid "$gid" --clear-groups "$@"; }
check "its user can't open the key file" not as_service cat $key_file
check "nor from inside its mounts" not inside cat $key_file
check "nor the descriptor it was given" not as_service cat "/proc/$process/fd/0"
check "which is /dev/null by now" equal "$(readlink "/proc/$process/fd/0")" /dev/null
# unreadable COMMAND…: prints what it can read all the same
unreadable() { ! "$@" bash -c "cd /proc/$process && for f in mem maps environ auxv stack syscall fd/0 map_files/*; do head -c 1 \$f && echo \$f; done 2>/dev/null | grep ."; }
check "root can read the process" not unreadable env
for user in alice bob; do
  check "$user can't open the key file" not as $user cat $key_file
  check "nor read the process" unreadable as $user
done
check "the service's own user can't read it either" unreadable as_service
check "it holds no capability" equal "$(sed -n 's/^CapEff:\t//p' "/proc/$process/status")" 0000000000000000
check "it runs under a filter of system calls" equal "$(sed -n 's/^Seccomp:\t//p' "/proc/$process/status")" 2
check "no part of it is swapped" has MemorySwapMax 0
nowhere() {
  journalctl --sync
  ! { journalctl --no-pager --output export; systemctl show --all $service $socket; cat /etc/systemd/system/codex-*; } |
    grep --text --fixed-strings "$1"
}
check "the key is in no journal, property or unit" nowhere $key
check "the journal has a line for the request" \
  bash -c "journalctl --sync; journalctl --no-pager --unit $service | grep -q status=200"

part "restarts under load"
rm -f /run/load.stop
as alice python3 load.py 8399 >/run/load.json &
load=$!
sleep 1
for _ in 1 2 3 4 5; do
  start=$SECONDS
  check "a restart" systemctl restart $service
  echo "      $((SECONDS - start)) s"
  sleep 1
done
touch /run/load.stop
wait $load
echo "      $(cat /run/load.json)"
check "no request was refused or lost" jq -e '.failed == 0 and .whole > 50' /run/load.json

part "another key"
write_key $second_key
check "the service restarts" systemctl restart $service
check "alice is answered" answers alice
check "with the new key" equal "$(last_key)" "Bearer $second_key"

part "no key"
rm $key_file
systemctl restart $service
check "a start without a key fails" within 20 has Result exit-code
check "and is tried again" within 20 has SubState auto-restart
check "with the reason in the properties" has ExecMainStatus 208
says() { journalctl --sync && journalctl --no-pager --unit $service | grep --quiet "$1"; }
check "and in the journal" says 'standard input: No such file or directory'
check "the port is still held" has ActiveState active $socket
impostor='import socket; socket.create_server(("127.0.0.1", 8399))'
check "nobody else can take it" not as bob python3 -c "$impostor"
post alice >/run/waiting &
waiting=$!
knock='import socket, time
for _ in range(60):
    socket.create_connection(("127.0.0.1", 8399)).close()
    time.sleep(0.1)'
check "60 connections come" as bob python3 -c "$knock"
check "it still is" has ActiveState active $socket
check "and the service still tries" bash -c "systemctl is-active $service | grep -q activating"
write_key $key
check "once the key is there it serves within 10 s" within 10 has ActiveState active
wait $waiting
check "whoever waited is answered" equal "$(cat /run/waiting)" 200
check "alice is answered" answers alice

part "a key that no account has the like of"
write_key 'not a key'
systemctl restart $service
check "the service fails" within 20 has SubState auto-restart
nowhere 'not a key' >/dev/null && ok "the journal doesn't repeat it" || not_ok "the journal doesn't repeat it"
write_key $key
check "a right one heals it" within 15 has ActiveState active

part "stopping"
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
cat >/etc/systemd/system/agenix-install-secrets.service <<UNIT
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/bash -c 'sleep 3; umask 377; echo $key >$key_file'
UNIT
rm -f $key_file
systemctl stop $socket $service
systemctl daemon-reload
before=$(property NRestarts)
check "the service starts" systemctl start $service
check "after its key is there" equal "$(property NRestarts)" "$before"
check "and serves" answers alice
sed -i "s/echo $key/echo $second_key/" /etc/systemd/system/agenix-install-secrets.service
systemctl daemon-reload
systemctl stop agenix-install-secrets.service
check "and doesn't end with that unit" has ActiveState active
check "a restart waits for the unit" systemctl restart $service
check "alice is answered" answers alice
check "with the new key" equal "$(last_key)" "Bearer $second_key"
systemctl stop agenix-install-secrets.service
rm /etc/systemd/system/agenix-install-secrets.service

part "another port"
configure other-port
check "a switch to it restarts the unit that names it" systemctl restart codex-responses-proxy-port.service
check "alice is answered there" answers alice 8400
check "and not where she was" not post alice 8399
check "the service is up" within 10 has ActiveState active
configure plain
systemctl restart codex-responses-proxy-port.service

part "named users only"
groupadd developers
useradd --create-home --groups developers carol
configure restricted
check "the service restarts" systemctl restart $service
now=$(exposure)
check "exposure, $now, is at most 1.3" at_most "$now" 1.3
check "alice is answered" answers alice
check "bob is refused" refuses bob
check "carol of the developers is answered" answers carol
check "root is refused" refuses root
bob=$(id -u bob)
check "the journal names bob's uid" says "uid=$bob"
shutdown() { as "$1" curl --silent --output /dev/null --write-out '%{http_code}' http://127.0.0.1:8399/shutdown; }
check "bob can't shut it down" equal "$(shutdown bob)" 403
usermod --append --groups developers bob
check "bob is answered once he is a developer" answers bob
check "alice can shut it down" equal "$(shutdown alice)" 200
check "it ends as a success" within 10 has Result success
check "and is not restarted" within 10 has ActiveState inactive
check "until the next request" answers alice
sed -i 's/"alice"/"nobody-by-this-name"/' /etc/systemd/system/$service
systemctl daemon-reload
systemctl restart $service
check "an unknown name fails the start" within 20 has SubState auto-restart
systemctl stop $socket

echo "$passed passed, $failed failed"
[ $failed = 0 ]
