#!/bin/sh
# The units for real: systemd as process 1 of a Debian in namespaces of its own, installed into by deploy/install.sh, then hangs, kills and
# crash loops. Needs root, debootstrap and a network for its packages; minutes. FOLDER is used again the next time.
#
#   sudo bench/systemd.sh FOLDER        exit code 0: everything happened as it should; 75: this machine cannot tell
#
# Nothing of the machine's own systemd is touched: the guest sees a control group hierarchy below one of its own.
set -eu

repo=$(cd "$(dirname "$0")/.." && pwd)
[ "$#" -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
cannot() { printf 'cannot be done here: %s\n' "$*" >&2; exit 75; }
[ "$(id -u)" = 0 ] || cannot 'only root may'
for tool in debootstrap unshare nsenter pivot_root; do command -v "$tool" >/dev/null || cannot "$tool is missing"; done
groups=/sys/fs/cgroup/systemd
[ -d "$groups" ] || groups=/sys/fs/cgroup
[ -w "$groups" ] || cannot "$groups cannot be written"

mkdir -p "$1"
folder=$(cd "$1" && pwd)
root=$folder/root
if [ ! -x "$root/lib/systemd/systemd" ]; then
  mirror=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources)
  debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,python3,python3-venv,ca-certificates,sudo bookworm "$root" "$mirror" >"$folder/debootstrap.log"
fi
rm -rf "$root/wheels" "$folder/made"
"$repo/.venv/bin/hatchling" build -t wheel -d "$folder/made" >/dev/null 2>&1
"$repo/.venv/bin/python" "$repo/deploy/wheels.py" fill "$root/wheels" --machine x86_64 --python 3.11 --role light --wheel "$folder"/made/*.whl
cp "$repo/deploy/install.sh" "$root/install.sh"

group=$groups/fleetune-try-$$
mkdir "$group"
guest=
# shellcheck disable=SC2329 # the trap does
cleanup() {
  if [ -n "$guest" ]; then kill -9 "$guest" 2>/dev/null || true; wait 2>/dev/null || true; fi
  for _ in 1 2 3 4 5 6 7 8 9 10; do # what is being killed holds it a moment longer
    find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
    [ -d "$group" ] || break
    sleep 0.3
  done
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# The shell that becomes the guest's process 1.
boot() {
  # Whoever starts this writes 0: itself.
  echo 0 >"$group/cgroup.procs"
  # shellcheck disable=SC2016
  exec unshare --cgroup --mount --pid --fork --kill-child --uts --ipc sh -ec '
    root=$1
    mount --make-rprivate /
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    if [ -d /sys/fs/cgroup/systemd ]; then
      mount -t tmpfs -o mode=755 tmpfs "$root/sys/fs/cgroup"
      mkdir "$root/sys/fs/cgroup/systemd"
      mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"
    else
      mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    fi
    for place in run tmp; do mount -t tmpfs -o mode=1777 tmpfs "$root/$place"; done
    chmod 755 "$root/run"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    cd "$root/dev"
    mknod -m 666 null c 1 3; mknod -m 666 zero c 1 5; mknod -m 666 full c 1 7
    mknod -m 666 random c 1 8; mknod -m 666 urandom c 1 9; mknod -m 666 tty c 5 0
    mkdir pts shm
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts pts
    ln -s pts/ptmx ptmx; ln -s /proc/self/fd fd
    mount -t tmpfs tmpfs shm
    cd "$root"
    mkdir -p old
    pivot_root . old
    umount -l /old
    hostname localhost
    exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --show-status=no --log-target=console --log-level=err
  ' sh "$root"
}
boot >"$folder/systemd.log" 2>&1 &
guest=$!

one=
tries=0
until [ -n "$one" ] && grep -q systemd "/proc/$one/comm" 2>/dev/null; do
  tries=$((tries + 1))
  [ "$tries" -lt 100 ] || { cat "$folder/systemd.log" >&2; cannot 'systemd does not start as process 1'; }
  sleep 0.3
  one=$(cat "/proc/$guest/task/$guest/children" 2>/dev/null | tr -d ' ')
done
inside() { nsenter -t "$one" -m -p -u -i -C /usr/bin/env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "$@"; }

cat >"$root/try.sh" <<'GUEST'
set -eu
failed=0
fact() { systemctl show -p "$2" --value "$1"; }
told() { printf '%s  %s\n' "$1" "$2"; [ "$1" = ok ] || failed=1; }
expect() { if [ "$2" = "$3" ]; then told ok "$1: $2"; else told NO "$1: $2, not $3"; fi; }
soon() { n=0; until eval "$1"; do n=$((n + 1)); [ "$n" -lt 300 ] || return 1; sleep 0.2; done; }
op() { sudo -u fleetune fleetune "$@"; }

soon 'systemctl is-system-running 2>/dev/null | grep -qE "running|degraded"'
rm -rf /etc/systemd/system/fleetune-*.service.d # of a run that was cut short
sh /install.sh --offline /wheels --torch none --extras coordinator --memory-max 500M >/tmp/install.log 2>&1 || { cat /tmp/install.log; exit 1; }
expect 'installed again' "$(sh /install.sh --offline /wheels --torch none | grep -c 'installed already')" 1

# The coordinator's packages are there; its role would want torch.
share=/opt/fleetune/current/share/fleetune
cp "$share/systemd/fleetune-coordinator.service" /etc/systemd/system/
getent passwd fleetune >/dev/null || useradd --system --user-group --home-dir /var/lib/fleetune --no-create-home --shell /usr/sbin/nologin fleetune
rm -rf /var/lib/fleetune /var/lib/fleetune-agent
install -d -o fleetune -g fleetune -m 0700 /var/lib/fleetune
install -d -o fleetune-agent -g fleetune-agent -m 0700 /var/lib/fleetune-agent
sed 's|^# state_dir = "[^"]*"|state_dir = "/var/lib/fleetune"|; s/^listen = .*/listen = "127.0.0.1:27433"/' "$share/config/coordinator.toml" >/etc/fleetune/coordinator.toml
ln -sfn /opt/fleetune/current/bin/fleetune /usr/local/bin/fleetune
systemctl daemon-reload
op init >/dev/null
systemctl start fleetune-coordinator
op token create --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["line"])' | sudo -u fleetune-agent fleetune-agent join --name guest - >/dev/null
systemctl start fleetune-agent
soon '[ "$(fact fleetune-agent StatusText)" = "connected to 127.0.0.1:27433, idle" ]' || true
expect 'status of the agent' "$(fact fleetune-agent StatusText)" 'connected to 127.0.0.1:27433, idle'

job() { printf 'name = "echo"\n[method]\nname = "echo"\nstate_mib = 4\n[rounds]\ncount = %d\nquorum = 1.0\n[devices]\nminimum = 1\n' "$1" | op submit - --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["job_id"])'; }
ended() { op jobs --json | python3 -c 'import json,sys; print({j["job_id"]: j["state"] for j in json.load(sys.stdin)["jobs"]}[sys.argv[1]])' "$1"; }
id=$(job 3)
soon '[ "$(ended $id)" = completed ]' || true
expect 'three rounds in the units' "$(ended "$id")" completed

for unit in fleetune-agent fleetune-coordinator; do
  mkdir -p "/etc/systemd/system/$unit.service.d"
  printf '[Service]\nWatchdogSec=6\nRestartSec=1\n' >"/etc/systemd/system/$unit.service.d/90-try.conf"
  systemctl daemon-reload
  systemctl restart "$unit"
  before=$(fact "$unit" NRestarts)
  begun=$(date +%s)
  kill -STOP "$(fact "$unit" MainPID)"
  soon '[ "$(fact $unit NRestarts)" != "$before" ] && [ "$(fact $unit ActiveState)" = active ]' || true
  took=$(($(date +%s) - begun))
  if [ "$(fact "$unit" NRestarts)" != "$before" ] && [ "$took" -le 15 ]; then told ok "$unit hangs, WatchdogSec=6: at work again after $took s"; else told NO "$unit hangs: $took s"; fi
done

id=$(job 40)
kill -9 "$(fact fleetune-coordinator MainPID)"
sleep 3
kill -9 "$(fact fleetune-agent MainPID)"
soon '[ "$(ended $id 2>/dev/null)" = completed ]' || true
expect 'forty rounds over kill -9 of both' "$(ended "$id")" completed

systemctl stop fleetune-coordinator
check=$(op check /var/lib/fleetune >/dev/null 2>&1 && echo sound || echo unsound)
expect 'history after that' "$check" sound
printf '[Unit]\nStartLimitBurst=3\n[Service]\nRestartSec=1\nExecStart=\nExecStart=/bin/sh -c "exit 8"\n' >/etc/systemd/system/fleetune-coordinator.service.d/90-try.conf
systemctl daemon-reload
systemctl reset-failed fleetune-coordinator 2>/dev/null || true
systemctl start fleetune-coordinator 2>/dev/null || true
soon '[ "$(fact fleetune-coordinator ActiveState)" = failed ]' || true
expect 'a crash loop stays down at the limit of 3' "$(fact fleetune-coordinator ActiveState) after $(fact fleetune-coordinator NRestarts)" 'failed after 3'

systemctl stop fleetune-agent
cp /etc/fleetune/agent.toml /tmp/agent.toml
sed -i '1i nonsense = 1' /etc/fleetune/agent.toml
systemctl reset-failed fleetune-agent 2>/dev/null || true
systemctl start fleetune-agent 2>/dev/null || true
sleep 3
expect 'wrong settings are not tried again' "$(fact fleetune-agent ActiveState) after $(fact fleetune-agent NRestarts)" 'failed after 0'
cp /tmp/agent.toml /etc/fleetune/agent.toml

sh /install.sh --uninstall --purge >/dev/null
expect 'left after --uninstall --purge' "$(find /opt/fleetune /etc/systemd/system/fleetune-agent.service /var/lib/fleetune-agent /etc/fleetune/agent.toml 2>/dev/null | wc -l)" 0
exit "$failed"
GUEST
inside sh /try.sh 2>&1 | grep -v 'unable to resolve host' >"$folder/try.log" && status=0 || status=$?
cat "$folder/try.log"
if grep -q '^NO' "$folder/try.log" || ! grep -q 'left after' "$folder/try.log"; then exit 1; fi
exit "$status"
