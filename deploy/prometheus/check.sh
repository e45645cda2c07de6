#!/bin/sh
# Tests the files for Prometheus with its own tool: the configuration, the rules, the alerts' unit tests.
#
#     deploy/prometheus/check.sh
#
# Without promtool it says so and is content: Debian and Ubuntu have it in the package `prometheus`.
set -eu
cd "$(dirname "$0")"
promtool=${PROMTOOL:-promtool}
if ! command -v "$promtool" >/dev/null 2>&1; then
    echo "skipped: promtool is not installed (on Debian and Ubuntu: apt install prometheus)"
    exit 0
fi
"$promtool" check config prometheus.yml
"$promtool" test rules tests/*.test.yml
