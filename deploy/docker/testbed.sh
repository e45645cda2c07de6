#!/bin/bash
# A member of a testbed: shapes its link, then is what entrypoint.sh makes of its arguments, as an account without any capability.
#
#   testbed.sh agent|coordinator ...       with UP_MBIT, DOWN_MBIT, LATENCY_MS; empty or 0 is as fast as it goes
#   testbed.sh link UP_MBIT DOWN_MBIT      another shape; what is under way goes on at the new rate
#   testbed.sh cut                         nothing comes through, in either direction, and nobody is told; `link` mends it
#   testbed.sh rates                       what is set
#
# The rate up is held by a token bucket on eth0. What comes in goes through a device of its own, ifb0, where another one holds the rate down.
# Needs NET_ADMIN for its own network namespace, and no right on the host.
set -euo pipefail
here=$(dirname "$0")
QUEUE_MS=100 # what waits longer in front of a link is dropped, as in a home router of some quality

# shape DEVICE MBIT: a bucket must hold what arrives between two ticks of the kernel's clock, and one unsplit burst of the sender.
shape() {
  local bits burst
  read -r bits burst < <(awk -v mbit="${2:-0}" 'BEGIN { bits = mbit * 1e6; burst = bits / 800; print int(bits), burst < 65536 ? 65536 : int(burst) }')
  if [ "$bits" -le 0 ]; then
    tc qdisc del dev "$1" root 2>/dev/null || true
    return
  fi
  tc qdisc replace dev "$1" root handle 1: tbf rate "$((bits < 8000 ? 8000 : bits))bit" burst "$burst" latency "${QUEUE_MS}ms"
  # Where the kernel can: half of the round trip in each direction.
  if [ "$(awk -v ms="${LATENCY_MS:-0}" 'BEGIN { print (ms > 0) }')" = 1 ]; then
    tc qdisc replace dev "$1" parent 1:1 netem delay "${LATENCY_MS}ms" limit 10000 2>/dev/null ||
      echo "testbed: this kernel has no netem, so $1 goes without its ${LATENCY_MS} ms" >&2
  fi
}

incoming() {
  [ ! -e /sys/class/net/ifb0 ] || return 0
  ip link add ifb0 type ifb
  ip link set ifb0 up txqueuelen 1000
  tc qdisc add dev eth0 handle ffff: ingress
  tc filter add dev eth0 parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev ifb0
}

link() {
  if [ "$(awk -v mbit="${2:-0}" 'BEGIN { print (mbit > 0) }')" = 1 ]; then incoming; fi
  shape eth0 "${1:-0}"
  if [ -e /sys/class/net/ifb0 ]; then shape ifb0 "${2:-0}"; fi
}

case ${1-} in
  link) link "${2-}" "${3-}" ;;
  cut)
    incoming
    # No packet fits into a bucket of 20 bytes.
    for device in eth0 ifb0; do tc qdisc replace dev "$device" root handle 1: tbf rate 8kbit burst 20 limit 20; done
    ;;
  rates) tc -s qdisc show ;;
  *)
    link "${UP_MBIT-}" "${DOWN_MBIT-}"
    # All of its capabilities go, also those that a program could bring.
    exec setpriv --reuid fleetune --regid fleetune --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs "$here/entrypoint.sh" "$@"
    ;;
esac
