#!/usr/bin/env bash
# Makes a virtual environment with everything that is needed to run, test and check this clone. Called by `make setup`.
#
#   deploy/setup.sh VENV EXTRAS          for example  deploy/setup.sh .venv coordinator,agent,train,torch-cpu,demo,dev
#
# Environment:  PYTHON        the interpreter to use; else the first suitable of 3.11, 3.12, 3.13, 3.10
#               TORCH_INDEX   where torch comes from on x86_64 Linux (default: the CPU builds of pytorch.org)
#
# torch goes in first and alone: any later `pip install` that meets it as a dependency would otherwise fetch the CUDA build,
# several gigabytes. What was put in is then pinned to the letter while the rest is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1 extras=$2
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# One line per step, with the seconds it takes; the output of the command is shown only if it fails.
step() {
  local words=$1 start=$SECONDS pid status=0
  shift
  if [ -t 1 ]; then
    "$@" >"$log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null || true; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
      printf '\r  %-52s %4d s' "$words ..." "$((SECONDS - start))"
      sleep 0.5
    done
    wait "$pid" || status=$?
    trap - INT TERM
    printf '\r'
  else
    printf '  %s ...\n' "$words"
    "$@" >"$log" 2>&1 || status=$?
  fi
  if [ "$status" -ne 0 ]; then
    printf '  %-52s failed after %d s\n' "$words" "$((SECONDS - start))"
    tail -n 40 "$log" | sed 's/^/    /' >&2
    return "$status"
  fi
  printf '  %-52s %4d s\n' "$words" "$((SECONDS - start))"
}

# 64 bit, 3.10 to 3.13, able to make virtual environments.
suitable() {
  "$1" -c 'import struct, sys, venv, ensurepip; sys.exit(not ((3, 10) <= sys.version_info < (3, 14) and struct.calcsize("P") == 8))' 2>/dev/null
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    suitable "$PYTHON" || die "PYTHON=$PYTHON will not do: Fleetune needs a 64-bit Python 3.10 to 3.13 with the modules venv and ensurepip.
$("$PYTHON" -V 2>&1 || true)
On Debian and Ubuntu, venv is a package of its own: apt install python3-venv"
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
    if suitable "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no suitable Python: Fleetune needs a 64-bit Python 3.10 to 3.13 with the modules venv and ensurepip.
Looked for python3.11, python3.12, python3.13, python3.10 and python3; name another with  make setup PYTHON=/path/to/python
On Debian and Ubuntu, venv is a package of its own: apt install python3-venv"
}

# The version of torch in the environment, with its build ("2.13.0+cpu"), or nothing.
torch_installed() {
  "$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

# The version that constraints.txt pins for this machine.
torch_pinned() {
  case "$(uname -s)-$(uname -m)" in
    Linux-aarch64) sed -n "s/^torch==\([^ ]*\) ; sys_platform == .*/\1/p" constraints.txt ;;
    *) sed -n "s/^torch==\([^ ]*\) ; sys_platform != .*/\1/p" constraints.txt ;;
  esac
}

install_torch() {
  local version pip=("$venv/bin/python" -m pip install -q --no-deps)
  version=$(torch_pinned)
  if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
    "${pip[@]}" "torch==$version" # PyPI's own wheel is a CPU build there
    return
  fi
  # pytorch.org marks each build: 2.13.0+cpu, 2.13.0+cu130. With the mark, no other index can slip its CUDA build in.
  case "$(basename "$torch_index")" in
    cpu | cu[0-9]* | rocm* | xpu) version+="+$(basename "$torch_index")" ;;
  esac
  # A wheel that lies on the machine, in a folder of pip's own find-links setting, spares the download.
  "${pip[@]}" --no-index "torch==$version" || "${pip[@]}" --index-url "$torch_index" "torch==$version"
}

install_rest() {
  "$venv/bin/python" -m pip install -q -c "$venv/constraints.txt" -e ".[$extras]"
}

if ! suitable "$venv/bin/python"; then
  python=$(find_python)
  step "virtual environment, $("$python" -V 2>&1)" "$python" -m venv --clear "$venv"
fi

grep -v '^torch==' constraints.txt >"$venv/constraints.txt"
torch=
case ",$extras," in
  *,torch-cpu,*)
    if [ -z "$(torch_installed)" ]; then
      step "torch $(torch_pinned)" install_torch || die "no torch $(torch_pinned) for this machine and $("$venv/bin/python" -V): pip found no wheel
in its own find-links folders nor at $torch_index. Name another index with TORCH_INDEX=..., or another
interpreter with PYTHON=... after removing $venv."
    fi
    torch=$(torch_installed)
    printf 'torch==%s\n' "$torch" >>"$venv/constraints.txt"
    ;;
  *) printf 'torch==0\n' >>"$venv/constraints.txt" ;; # no such version: a light environment that asked for torch would fail
esac

step "fleetune[$(printf '%s' "$extras" | sed 's/,/, /g')]" install_rest
[ "$(torch_installed)" = "$torch" ] || die "torch $torch was replaced by $(torch_installed); remove $venv and run make setup again"
