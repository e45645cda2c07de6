#!/bin/sh
# What a container does: `agent [OPTIONS]` or `coordinator [OPTIONS]` runs that daemon, watched; anything else is a command to run.
#
# A coordinator that has no authority yet makes it (fleetune init), for FLEETUNE_ADDRESS (HOST:PORT that devices dial).
# An agent that has joined no fleet joins with the line in the file FLEETUNE_JOIN_FILE, if there is one.
set -eu
umask 077
here=$(dirname "$0")

case ${1-} in
  coordinator)
    shift
    mkdir -p "$FLEETUNE_COORDINATOR_STATE_DIR"
    if [ -z "${FLEETUNE_COORDINATOR_TLS_ROOTS-}" ] && [ ! -e "$FLEETUNE_IDENTITY/identity.json" ]; then
      fleetune init --operator "${FLEETUNE_OPERATOR:-admin}" ${FLEETUNE_ADDRESS:+--address "$FLEETUNE_ADDRESS"}
    fi
    exec python3 -IS "$here/watched.py" -- fleetune serve "$@"
    ;;
  agent)
    shift
    line=${FLEETUNE_JOIN_FILE:-/run/secrets/fleetune_join}
    if [ ! -e "$FLEETUNE_AGENT_STATE_DIR/identity/identity.json" ] && [ -s "$line" ]; then
      mkdir -p "$FLEETUNE_AGENT_STATE_DIR"
      fleetune-agent join - <"$line"
    fi
    exec python3 -IS "$here/watched.py" -- fleetune-agent run "$@"
    ;;
  '')
    echo "entrypoint: agent, coordinator, or a command such as: fleetune version" >&2
    exit 2
    ;;
  *) exec "$@" ;;
esac
