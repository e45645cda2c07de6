#!/bin/sh
# Has the compose files read by compose itself, and the Dockerfiles by hadolint, where those are installed; says what was left out.
#
#     deploy/docker/check.sh
#
# What is asked of these files beyond that (no frontend from elsewhere, accounts, health checks, pins): tests/deploy/test_docker.py.
set -eu
cd "$(dirname "$0")/.."

read_by=''
for compose in 'docker compose' docker-compose; do
  $compose version >/dev/null 2>&1 || continue
  $compose -f compose.yaml --profile monitoring config -q
  read_by="$read_by${read_by:+ and }$compose"
done
if [ -n "$read_by" ]; then echo "compose.yaml is read by $read_by"; else
  echo "skipped: neither docker compose nor docker-compose is installed (on Debian and Ubuntu: apt install docker-compose)"
fi
if command -v hadolint >/dev/null 2>&1; then
  # DL3008: packages of the base's own distribution come in the versions it has. DL3013, DL3042: pip runs in packages.sh, with pins.
  hadolint --ignore DL3008 --ignore DL3013 --ignore DL3042 docker/Dockerfile docker/Dockerfile.jetson
else
  echo "skipped: hadolint is not installed"
fi
