#!/bin/sh
# Installs Fleetune on a board or a server: an environment of its own with the torch that fits the machine, an account, a systemd unit.
# Raspberry Pi OS 64-bit (bookworm, trixie), JetPack 6 and 7, Debian and Ubuntu. This file and one wheel are all it needs:
#
#   sudo sh install.sh --wheel fleetune-0.1.0-py3-none-any.whl          # an agent, from the package indexes
#   sudo sh install.sh --offline wheels/                                # the same without a network
#   sh install.sh --help
#
# Said twice it does nothing the second time; with a newer wheel it upgrades; state and settings stay.
# Facts can be faked, for tests and to see what another board would get (with --dry-run):
#   FLEETUNE_FACTS=DIR        read etc/os-release, proc/device-tree/model, etc/nv_tegra_release and dev/ below DIR
#   FLEETUNE_MACHINE, FLEETUNE_BITS, FLEETUNE_SYSTEM      in place of `uname -m`, `getconf LONG_BIT`, `uname -s`
#   FLEETUNE_FREE_MIB         in place of what `df` says
#   DESTDIR=DIR               units, settings and commands are written below DIR; no account is made, nothing is started
set -eu
umask 022 # the accounts that run it read what root installs

PUBLIC_CPU_INDEX=https://download.pytorch.org/whl/cpu
JETPACK_6_INDEX=https://pypi.jetson-ai-lab.io/jp6/cu126
JETPACK_7_INDEX=https://pypi.jetson-ai-lab.io/sbsa/cu130
TORCH_RANGE='torch>=2.6,<3' # for builds that constraints.txt does not pin

FAILED=1 USAGE=2 MACHINE=3 PACKAGES=4 ROOM=5 WRONG_TORCH=6 BROKEN=7

usage() {
  cat <<'TEXT'
Usage: install.sh [options]

  --role agent|coordinator   what this machine does; said once for each, where it does both   [agent]
  --wheel FILE               fleetune-*.whl, of `make wheel`   [the newest in --offline's folder, beside this file, or in ../dist]
  --offline DIR              take every package from this folder and ask no index
  --prefix DIR               where the environments lie   [/opt/fleetune]
  --python COMMAND           the interpreter   [of the JetPack, else python3, python3.13 ... python3.10]
  --torch KIND               auto, cpu, jetson, cuda or none   [auto: jetson on a Jetson, else cpu; cuda is never a guess]
  --torch-index URL          where torch comes from; "pip" for pip's own index   [by kind; also FLEETUNE_TORCH_INDEX]
  --extras NAMES             further extras, for example parquet
  --memory-max SIZE          limit of the unit, for example 1500M; "none" takes it away again
  --no-systemd               environment only: no account, no unit, no /etc; needs no root
  --no-start                 install the unit, but neither enable nor start it
  --rollback                 back to the version before
  --uninstall                remove programs and unit; --purge: settings, state, identity and account too
  --dry-run                  print what would be done
  -h, --help

Exit codes:
  0  done, or nothing to do
  1  a command failed; what it said stands above
  2  wrong options
  3  this machine cannot run it: 32-bit, its Python, its JetPack, no systemd
  4  a package was not found, or no index could be reached
  5  not enough room, or not permitted
  6  the torch that would be installed is not the one for this machine
  7  installed but not working, or not starting; what ran before runs again
TEXT
}

say() { printf '%s\n' "$*"; }
warn() { printf 'install: %s\n' "$*" >&2; }
# die CODE WHAT REMEDY
die() {
  printf 'install: %s\n' "$2" >&2
  [ -z "${3-}" ] || printf '         %s\n' "$3" >&2
  exit "$1"
}

# The one way in which this script changes anything.
run() {
  if [ "$dry_run" = yes ]; then
    printf '+ %s\n' "$*"
  else
    "$@"
  fi
}

# put FILE MODE: its content from standard input, by way of a file beside it.
put() {
  if [ "$dry_run" = yes ]; then
    printf '+ write %s\n' "$1"
    cat >/dev/null
    return
  fi
  mkdir -p "$(dirname "$1")"
  cat >"$1.new"
  chmod "$2" "$1.new"
  mv -f "$1.new" "$1"
}

# ------------------------------------------------------------------------------------------------------------- options

role='' wheel='' offline='' prefix=/opt/fleetune python='' torch='' torch_index=${FLEETUNE_TORCH_INDEX-} extras='' memory_max=''
systemd='' start=yes verb=install purge=no dry_run=no

value() { [ "$#" -ge 2 ] && [ -n "$2" ] || die $USAGE "$1 needs a value." "sh install.sh --help"; }
while [ "$#" -gt 0 ]; do
  case $1 in
    --*=*) # --prefix=DIR is --prefix DIR
      option=$1
      shift
      set -- "${option%%=*}" "${option#*=}" "$@"
      continue
      ;;
    --role) value "$@"; role=$2; shift ;;
    --wheel) value "$@"; wheel=$2; shift ;;
    --offline) value "$@"; offline=$2; shift ;;
    --prefix) value "$@"; prefix=$2; shift ;;
    --python) value "$@"; python=$2; shift ;;
    --torch) value "$@"; torch=$2; shift ;;
    --torch-index) value "$@"; torch_index=$2; shift ;;
    --extras) value "$@"; extras=$2; shift ;;
    --memory-max) value "$@"; memory_max=$2; shift ;;
    --no-systemd) systemd=no ;;
    --no-start) start=no ;;
    --rollback) verb=rollback ;;
    --uninstall) verb=uninstall ;;
    --purge) purge=yes ;;
    --dry-run) dry_run=yes ;;
    -h | --help) usage; exit 0 ;;
    *) die $USAGE "there is no option $1." "sh install.sh --help" ;;
  esac
  shift
done

case $role in '' | agent | coordinator) ;; *) die $USAGE "--role is agent or coordinator, not $role." ;; esac
case $torch in '' | auto | cpu | jetson | cuda | none) ;; *) die $USAGE "--torch is auto, cpu, jetson, cuda or none, not $torch." ;; esac
case $prefix in
  / | /usr | /usr/local | /etc | /home | /root | /var) die $USAGE "--prefix $prefix is no folder of Fleetune's own." "Take /opt/fleetune." ;;
  *[!A-Za-z0-9/._+@-]*) die $USAGE "--prefix $prefix holds signs that units and scripts cannot carry." "Take /opt/fleetune." ;;
  /*) prefix=${prefix%/} ;;
  *) prefix=$(pwd)/${prefix%/} ;;
esac
case $extras in *[!A-Za-z0-9,_-]*) die $USAGE "--extras is a list such as parquet, not $extras." ;; esac
case $memory_max in
  '' | none) ;;
  *[!0-9KMGT%]* | [!0-9]* | *[KMGT%]?*) die $USAGE "--memory-max $memory_max is no size." "For example 1500M, 2G or 80%." ;;
esac
[ "$purge" = no ] || [ "$verb" = uninstall ] || die $USAGE "--purge goes with --uninstall."
[ -z "$wheel" ] || [ -f "$wheel" ] || die $USAGE "--wheel $wheel is no file." "\`make wheel\` in a clone makes dist/fleetune-*.whl."
[ -z "$offline" ] || [ -d "$offline" ] || die $USAGE "--offline $offline is no folder." "It holds the wheels; docs/edge-install.md says how to fill one."
[ -z "$offline" ] || offline=$(cd "$offline" && pwd)

here=$(cd "$(dirname "$0")" && pwd)
versions=$prefix/versions
etc=${DESTDIR-}/etc/fleetune
units=${DESTDIR-}/etc/systemd/system
commands=${DESTDIR-}/usr/local/bin

# What the installation before was told, so that an upgrade needs no options.
kept() { sed -n "s/^$1=//p" "$prefix/settings" 2>/dev/null | head -n 1; }
program_of() { [ "$1" = agent ] && echo fleetune-agent || echo fleetune; }
unit_of() { echo "fleetune-$1"; }
account_of() { program_of "$1"; }
state_of() { echo "/var/lib/$(account_of "$1")"; }

# --------------------------------------------------------------------------------------------------------- the machine

facts=${FLEETUNE_FACTS-}
system=${FLEETUNE_SYSTEM:-$(uname -s)}
machine=${FLEETUNE_MACHINE:-$(uname -m)}
bits=${FLEETUNE_BITS:-$(getconf LONG_BIT)}

os_release() { sed -n "s/^$1=//p" "$facts/etc/os-release" 2>/dev/null | tr -d \" | head -n 1; }
model() { { tr -d '\000' <"$facts/proc/device-tree/model"; } 2>/dev/null || true; }

# Sets board (raspberry, jetson or other), jetpack (6, 7, ... or empty) and gpu (yes or no).
look() {
  board=other jetpack='' gpu=no
  [ ! -e "$facts/dev/nvidia0" ] || gpu=yes
  case $(model) in *'Raspberry Pi'*) board=raspberry ;; *Jetson* | *Orin* | *NVIDIA*) board=jetson ;; esac
  release=$(sed -n 's/^# R\([0-9]*\) (release).*/\1/p' "$facts/etc/nv_tegra_release" 2>/dev/null | head -n 1)
  if [ -n "$release" ]; then
    board=jetson
    case $release in 36) jetpack=6 ;; 38 | 39) jetpack=7 ;; 32) jetpack=4 ;; 34 | 35) jetpack=5 ;; esac
  fi
}

# Accounts and units, or the programs alone: as told, else as the time before.
choose_systemd() {
  [ -n "$systemd" ] || systemd=$(kept systemd)
  [ -n "$systemd" ] || systemd=yes
  case $systemd$prefix in
    yes/home/* | yes/root | yes/root[/]*)
      die $USAGE "the units see no home folder, so $prefix cannot hold their programs." "--prefix /opt/fleetune; or --no-systemd"
      ;;
  esac
}

check_machine() {
  [ "$system" = Linux ] || die $MACHINE "this script is for Linux, not $system." "Elsewhere: README.md, 'Daily use', with pip."
  case $machine in
    x86_64 | aarch64) ;;
    arm64) machine=aarch64 ;;
    armv6l | armv7l | armhf | i?86)
      die $MACHINE "this system is 32-bit ($machine); PyTorch and NumPy have no packages for it." \
        "Write Raspberry Pi OS (64-bit) to the card with rpi-imager. A Pi 2 or older and a Pi Zero (1) cannot run it."
      ;;
    *) die $MACHINE "$machine is no processor that the packages are made for." "x86_64 and aarch64 are." ;;
  esac
  # A 64-bit kernel under a 32-bit userland says aarch64.
  [ "$bits" = 64 ] || die $MACHINE "this system is 32-bit under a 64-bit kernel; PyTorch and NumPy have no packages for it." \
    "Write Raspberry Pi OS (64-bit) to the card with rpi-imager."
  case $(os_release ID) in
    debian | raspbian | ubuntu) ;;
    alpine) die $MACHINE "Alpine's C library is musl, and PyTorch has no packages for it." "Take Debian, Ubuntu or Raspberry Pi OS." ;;
    *) warn "$(os_release PRETTY_NAME) was not tried; Debian, Ubuntu, Raspberry Pi OS and JetPack were meant." ;;
  esac
  case $jetpack in
    4 | 5) die $MACHINE "JetPack $jetpack is too old: its Python has no packages." "Flash JetPack 6 with NVIDIA's SDK Manager (Orin); a Nano or Xavier NX cannot." ;;
  esac
}

# 64-bit, 3.10 to 3.13, able to make environments.
suitable() {
  "$1" -c 'import struct, sys, venv, ensurepip; sys.exit(not ((3, 10) <= sys.version_info < (3, 14) and struct.calcsize("P") == 8))' 2>/dev/null
}

choose_python() {
  wanted=''
  case $jetpack in 6) wanted=python3.10 ;; 7) wanted=python3.12 ;; esac
  if [ -z "$python" ]; then
    python=$(kept python)
    [ -z "$python" ] || suitable "$python" || python=''
  fi
  if [ -n "$python" ]; then
    suitable "$python" || die $MACHINE "--python $python will not do: $("$python" -V 2>&1 || echo 'it does not start')." \
      "Fleetune needs a 64-bit Python 3.10 to 3.13 with venv: apt install python3-venv"
  elif [ -n "$wanted" ]; then
    suitable "$wanted" || die $MACHINE "JetPack $jetpack has PyTorch for $wanted only, and it is not here (or lacks venv)." \
      "apt install $wanted $wanted-venv"
    python=$wanted
  else
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
      if suitable "$candidate"; then
        python=$candidate
        break
      fi
    done
    [ -n "$python" ] || die $MACHINE "no Python 3.10 to 3.13 with the modules venv and ensurepip ($(python3 -V 2>&1 || echo 'no python3'))." \
      "apt install python3 python3-venv; or name one with --python"
  fi
  python=$(command -v "$python")
  if [ "$systemd" = yes ] && [ -z "${DESTDIR-}" ]; then
    case $("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')/ in
      /home/* | /root[/]*) die $MACHINE "$python lies in a home folder, which the units do not see." "--python /usr/bin/python3; or --no-systemd" ;;
    esac
  fi
  python_version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [ -n "$wanted" ] && [ "$torch" != none ] && [ "$torch" != cpu ] && [ "python$python_version" != "$wanted" ]; then
    die $MACHINE "JetPack $jetpack has PyTorch for $wanted, not for $python_version." "--python $wanted"
  fi
}

# Sets torch (cpu, jetson, cuda, none), torch_index ("pip" or an address) and torch_wanted (what pip is asked for).
choose_torch() {
  [ -n "$torch" ] || torch=$(kept torch)
  [ -n "$torch_index" ] || torch_index=$(kept torch_index)
  if [ -z "$torch" ] || [ "$torch" = auto ]; then
    if [ "$board" = jetson ]; then torch=jetson; else torch=cpu; fi
  fi
  if [ "$torch" = jetson ] && [ "$board" != jetson ]; then
    die $WRONG_TORCH "--torch jetson is for NVIDIA's boards, and this is $(model | grep . || echo "$machine")." "--torch cpu, or leave it out"
  fi
  if [ "$torch" = jetson ] && [ -z "$jetpack" ] && [ -z "$torch_index" ]; then
    die $WRONG_TORCH "the JetPack of this board is not known: /etc/nv_tegra_release is missing or of a release that this script does not know." \
      "Name the index of its PyTorch with --torch-index, or take --torch cpu."
  fi
  if [ "$torch" = cuda ] && [ "$board" = raspberry ]; then
    die $WRONG_TORCH "a Raspberry Pi has no use for the gigabytes of a CUDA build." "--torch cpu, or leave it out"
  fi
  if [ "$torch" = cpu ] && [ "$gpu" = yes ] && [ "$verb" = install ]; then
    warn "there is an NVIDIA GPU here, and PyTorch's CPU build is taken; --torch cuda downloads about 3 GB and uses it."
  fi
  if [ -z "$torch_index" ]; then
    case $torch in
      cpu) torch_index=$PUBLIC_CPU_INDEX ;;
      cuda | none) torch_index=pip ;;
      jetson) if [ "$jetpack" = 7 ]; then torch_index=$JETPACK_7_INDEX; else torch_index=$JETPACK_6_INDEX; fi ;;
    esac
  fi
  torch_wanted=$TORCH_RANGE
}

# ------------------------------------------------------------------------------------------------------------ the wheel

find_wheel() {
  made=no
  if [ -z "$wheel" ]; then
    for folder in ${offline:+"$offline"} "$here" "$here/../dist"; do
      wheel=$(find "$folder" -maxdepth 1 -name 'fleetune-*.whl' 2>/dev/null | sort -V | tail -n 1)
      [ -z "$wheel" ] || break
    done
  fi
  if [ -n "$wheel" ]; then
    wheel=$(cd "$(dirname "$wheel")" && pwd)/$(basename "$wheel")
  elif [ -f "$here/../pyproject.toml" ]; then
    made=yes # from the clone that this script lies in
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../pyproject.toml" | head -n 1)
    wheel=$here/../dist/fleetune-$version-py3-none-any.whl
    if [ "$dry_run" = no ]; then
      scratch
      "$python" -m venv "$work/build" || die $FAILED "$python cannot make an environment." "apt install python3-venv"
      [ -z "$offline" ] || export PIP_NO_INDEX=1 PIP_FIND_LINKS="$offline"
      "$work/build/bin/python" -m pip wheel -q --no-deps -w "$work/wheel" "$here/.." >"$work/log" 2>&1 || {
        tail -n 15 "$work/log" >&2
        die $PACKAGES "no wheel could be made of the clone $(cd "$here/.." && pwd)." "Make one elsewhere with \`make wheel\` and name it with --wheel."
      }
      wheel=$(find "$work/wheel" -name 'fleetune-*.whl')
    else
      say "+ $python -m pip wheel --no-deps -w TEMPORARY $(cd "$here/.." && pwd)"
    fi
  else
    die $USAGE "no fleetune-*.whl in ${offline:+$offline, }$here." "Name it: --wheel FILE. \`make wheel\` in a clone makes one."
  fi
  version=$(basename "$wheel" | sed -n 's/^fleetune-\([0-9][0-9A-Za-z.+!]*\)-py3-none-any\.whl$/\1/p')
  [ -n "$version" ] || die $USAGE "$(basename "$wheel") is not named like a wheel of Fleetune." "fleetune-VERSION-py3-none-any.whl"
}

# The pins that this wheel was tested with travel in it; `make wheel` puts them there.
read_constraints() {
  if [ "$made" = yes ] && [ "$dry_run" = yes ]; then
    constraints=$(cat "$here/../constraints.txt")
    return
  fi
  constraints=$("$python" - "$wheel" <<'PYTHON'
import sys, zipfile
try:
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".data/data/share/fleetune/constraints.txt")]
        print(wheel.read(names[0]).decode() if names else "")
except (OSError, zipfile.BadZipFile) as error:
    sys.exit(f"{sys.argv[1]}: {error}")
PYTHON
  ) || die $PACKAGES "$wheel is no wheel, or is damaged." "Copy it again."
  [ -n "$constraints" ] || [ ! -f "$here/../constraints.txt" ] || constraints=$(cat "$here/../constraints.txt")
  [ -n "$constraints" ] || die $PACKAGES "$wheel holds no constraints.txt, so nothing says which versions were tested with it." "Take a wheel of \`make wheel\`."
}

# "torch==2.9.1" as constraints.txt has it for this processor; pytorch.org's own index marks its builds "+cpu".
pin_torch() {
  if [ "$torch" = cpu ]; then
    if [ "$machine" = aarch64 ]; then sign='=='; else sign='!='; fi
    torch_wanted=$(printf '%s\n' "$constraints" | sed -n "s/^\(torch==[^ ;]*\) *;.*platform_machine $sign 'aarch64'.*/\1/p" | head -n 1)
    [ -n "$torch_wanted" ] || die $PACKAGES "constraints.txt pins no torch for $machine." "Take a wheel of \`make wheel\`."
  fi
}

# ------------------------------------------------------------------------------------------------------------- packages

scratch() {
  if [ -z "${work-}" ]; then
    work=$(mktemp -d)
    # Also on Ctrl-C: what is half installed must not be there at the next try.
    trap 'rm -rf "$work" ${unfinished:+"$unfinished"}' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
  fi
}

# pip WORDS: of the new environment. From the folder alone where one was named.
pip() {
  if [ "$dry_run" = yes ]; then
    printf '+ %s/bin/python -m pip %s%s\n' "$new" "$*" "${offline:+ --no-index --find-links $offline}"
    return
  fi
  if [ -n "$offline" ]; then
    set -- "$@" --no-index --find-links "$offline"
  fi
  # Half of a small card would be pip's cache otherwise, in root's home and for ever.
  PIP_CACHE_DIR=$prefix/cache PIP_DISABLE_PIP_VERSION_CHECK=1 "$new/bin/python" -m pip "$@" >"$work/log" 2>&1
}

packages_failed() {
  tail -n 15 "$work/log" >&2
  case $(cat "$work/log") in
    *'No space left'*) die $ROOM "the disk is full." "$free_remedy" ;;
  esac
  if [ -n "$offline" ]; then
    die $PACKAGES "$1 cannot be installed from $offline." "Fill it again for this kind of machine and Python $python_version: docs/edge-install.md, 'Without a network'."
  fi
  die $PACKAGES "$1 cannot be installed." "$2"
}

# What torch would bring along, from its metadata; WRONG_TORCH where that is CUDA's gigabytes. Old pips tell only after.
judge_before() {
  "$new/bin/python" -m pip install --help 2>/dev/null | grep -q -- --report || return 0
  # shellcheck disable=SC2086
  pip install --quiet --dry-run --ignore-installed --no-deps --report "$work/report" $index "$torch_wanted" || packages_failed "$torch_wanted" \
    "Is $torch_index reached from here? Another index: --torch-index URL, or --torch-index pip for pip's own."
  "$new/bin/python" - "$work/report" "$torch" <<'PYTHON' || die $WRONG_TORCH "the torch of $torch_index is not for this machine; nothing was installed." "Name another with --torch-index: $PUBLIC_CPU_INDEX has CPU builds."
import json, re, sys
from pip._vendor.packaging.requirements import Requirement
metadata = json.load(open(sys.argv[1], encoding="utf-8"))["install"][0]["metadata"]
version, needs = metadata["version"], [Requirement(line) for line in metadata.get("requires_dist", [])]
wanted = [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
cuda = [name for name in wanted if re.match(r"(nvidia|cuda|triton)\b", name.lower())]
if sys.argv[2] == "cpu" and (cuda or "+cu" in version):
    sys.exit(f"install: torch {version} is a CUDA build" + (f" and would fetch {', '.join(cuda)}" if cuda else ""))
if sys.argv[2] != "cpu" and "+cpu" in version:
    sys.exit(f"install: torch {version} is a CPU build; the GPU would lie idle")
PYTHON
}

# What is there now, from its files alone: a build for another processor may not survive being imported.
judge_after() {
  "$new/bin/python" - "$torch" <<'PYTHON' || die $WRONG_TORCH "the torch of $torch_index is not for this machine; it was removed again." "Name another with --torch-index: $PUBLIC_CPU_INDEX has CPU builds."
import importlib.util, pathlib, re, sys
from importlib import metadata
torch = metadata.distribution("torch")
text = pathlib.Path(importlib.util.find_spec("torch").submodule_search_locations[0], "version.py").read_text(encoding="utf-8")
built_for = re.search(r"^cuda\b.*?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
try:
    from pip._vendor.packaging.requirements import Requirement
    wanted = [Requirement(line) for line in torch.requires or []]
    wanted = [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
except ImportError:
    wanted = []
cuda = [name for name in wanted if re.match(r"(nvidia|cuda|triton)\b", name.lower())]
if sys.argv[1] == "cpu" and (built_for or cuda):
    sys.exit(f"install: torch {torch.version} is built for CUDA {built_for[1] if built_for else ''} and wants {', '.join(cuda) or 'no package more'}")
if sys.argv[1] != "cpu" and not built_for:
    sys.exit(f"install: torch {torch.version} is a CPU build; the GPU would lie idle")
PYTHON
}

install_torch() {
  index=''
  if [ -z "$offline" ] && [ "$torch_index" != pip ]; then
    index="--index-url $torch_index"
  fi
  if [ "$dry_run" = yes ]; then
    say "+ ask pip what $torch_wanted from $torch_index would bring, and refuse what is not for this machine"
  else
    judge_before
  fi
  say "torch: $torch_wanted, $torch build"
  # shellcheck disable=SC2086
  pip install --quiet --no-deps $index "$torch_wanted" || packages_failed "$torch_wanted" \
    "Is $torch_index reached from here? Another index: --torch-index URL, or --torch-index pip for pip's own."
  [ "$dry_run" = yes ] || judge_after
}

# Everything, into an environment that nobody uses yet.
fill() {
  all=train
  [ "$torch" != none ] || all=''
  if has_role coordinator || [ "$role" = coordinator ]; then all=coordinator,${all:-train}; fi
  [ -z "$extras" ] || all=${all:+$all,}$extras
  if [ "$torch" != none ]; then
    install_torch
  fi
  if [ "$dry_run" = no ]; then
    printf '%s\n' "$constraints" | grep -v '^torch==' >"$work/constraints.txt"
    # To the letter: nothing that follows replaces it, and where there is to be none, nothing brings one.
    "$new/bin/python" -c 'from importlib import metadata
try: print("torch==" + metadata.version("torch"))
except metadata.PackageNotFoundError: print("torch==0")' >>"$work/constraints.txt"
  fi
  say "fleetune $version${all:+ with $all}"
  set -- "$wheel${all:+[$all]}"
  [ "$torch" = none ] || set -- "$@" torch # for what it needs itself
  pip install --quiet --constraint "${work:-TEMPORARY}/constraints.txt" "$@" ||
    packages_failed "fleetune $version" "Is pip's index reached from here? \`pip config list\` tells which; --offline DIR goes without."
  say "look at what was installed"
  run "$new/bin/fleetune-agent" version >/dev/null || die $BROKEN "the installed fleetune-agent does not start; it was removed again."
  if [ "$torch" != none ]; then
    run "$new/bin/python" -c 'import torch; torch.zeros(2).add(1)' || die $BROKEN "the installed torch does not run on this machine; it was removed again." \
      "An illegal instruction means a build for newer processors. \`fleetune-agent doctor\` knows boards; --torch-index takes another build."
  fi
  run "$new/bin/python" -m pip check --quiet >/dev/null || warn "\`pip check\` complains: $new/bin/python -m pip check"
}

# ------------------------------------------------------------------------------------------------ versions side by side

has_role() { [ -e "$prefix/roles/$1" ]; }
current() { readlink "$prefix/current" 2>/dev/null || true; }

# A link replaced by rename: at no moment is there none.
point() {
  run ln -sfn "$2" "$prefix/.$1.new"
  run mv -fT "$prefix/.$1.new" "$prefix/$1"
}

identify() {
  if [ "$made" = yes ] && [ "$dry_run" = yes ]; then
    mark=CHECKOUT
  else
    mark=$({ cat "$wheel"; printf '%s' "$constraints$python_version$torch$torch_index$extras$roles"; } | sha256sum | cut -c 1-8)
  fi
  name=$version-$mark
  new=$versions/$name
}

check_room() {
  case $torch in none) needed_mib=400 ;; cpu) needed_mib=1800 ;; *) needed_mib=8000 ;; esac
  existing=$prefix
  while [ ! -d "$existing" ]; do existing=$(dirname "$existing"); done
  free_mib=${FLEETUNE_FREE_MIB:-$(df -m --output=avail "$existing" | tail -n 1 | tr -d ' ')}
  free_remedy="Make room (du -xh --max-depth=2 / | sort -h | tail), or take a larger disk with --prefix."
  [ "$free_mib" -ge "$needed_mib" ] || die $ROOM "$free_mib MiB are free at $existing, and up to $needed_mib MiB are needed." "$free_remedy"
  [ "$dry_run" = yes ] || [ -w "$existing" ] || die $ROOM "$existing cannot be written by $(id -un)." "sudo; or --prefix ~/fleetune --no-systemd without it"
}

# Only this version and the one before stay.
prune() {
  for folder in "$versions"/*; do
    [ -d "$folder" ] || continue
    case $(basename "$folder") in "$name" | "$(basename "$(readlink "$prefix/previous" 2>/dev/null || echo none)")") ;; *) run rm -rf "$folder" ;; esac
  done
}

# -------------------------------------------------------------------------------------------------------------- systemd

systemctl_() { [ -n "${DESTDIR-}" ] || run systemctl "$@"; }
is_active() { [ -z "${DESTDIR-}" ] && systemctl is-active --quiet "$1" 2>/dev/null; }
systemd_version() { systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9]*\).*/\1/p'; }

make_account() {
  [ -z "${DESTDIR-}" ] || return 0
  account=$(account_of "$1")
  if ! getent passwd "$account" >/dev/null; then
    run useradd --system --user-group --home-dir "$(state_of "$1")" --no-create-home --shell /usr/sbin/nologin "$account"
  fi
  run install -d -o "$account" -g "$account" -m 0700 "$(state_of "$1")"
  if [ "$1" = agent ] && { [ "$board" != other ] || [ "$gpu" = yes ]; }; then
    for group in video render; do
      if getent group "$group" >/dev/null; then run usermod -aG "$group" "$account"; fi
    done
  fi
}

# template NAME SED-SCRIPT FILE: one of the files that travel in the wheel.
template() {
  if [ "$dry_run" = yes ]; then
    put "$3" 0644 </dev/null
  else
    [ -s "$share/$1" ] || die $PACKAGES "$share/$1 is missing from this wheel." "Take a wheel of \`make wheel\`."
    sed "$2" "$share/$1" | put "$3" 0644
  fi
}

# write_units ROLE ENVIRONMENT
write_units() {
  share=$2/share/fleetune
  unit=$(unit_of "$1")
  template "systemd/$unit.service" "s#/opt/fleetune/#$prefix/#g" "$units/$unit.service"
  folder=$units/$unit.service.d
  kind=''
  if [ "$1" = agent ]; then
    case $board in raspberry) kind=raspberry ;; jetson) kind=jetson ;; *) [ "$gpu" = no ] || kind=nvidia ;; esac
  fi
  if [ -n "$kind" ]; then
    template "systemd/drop-in/board-$kind.conf" '' "$folder/10-board.conf"
  elif [ -e "$folder/10-board.conf" ]; then
    run rm -f "$folder/10-board.conf"
  fi
  installed=$(systemd_version)
  if [ "${installed:-0}" -ge 254 ]; then
    template systemd/drop-in/restart-backoff.conf '' "$folder/20-restart-backoff.conf"
  fi
  if [ "$memory_max" = none ]; then
    run rm -f "$folder/50-memory.conf"
  elif [ -n "$memory_max" ] && { [ "$1" = "$role" ] || [ -z "$role" ]; }; then
    template systemd/drop-in/memory.conf "s/^MemoryMax=.*/MemoryMax=$memory_max/; /^MemoryHigh=/d" "$folder/50-memory.conf"
  fi
  if [ ! -e "$etc/$1.toml" ]; then
    template "config/$1.toml" "s|^# state_dir = \"[^\"]*\"|state_dir = \"$(state_of "$1")\"|" "$etc/$1.toml"
  fi
  link_command "$(program_of "$1")"
}

link_command() {
  if [ -e "$commands/$1" ] && [ "$(readlink "$commands/$1")" != "$prefix/current/bin/$1" ]; then
    warn "$commands/$1 is not of this installation and is left alone; the program is $prefix/current/bin/$1."
    return
  fi
  run mkdir -p "$commands"
  run ln -sfn "$prefix/current/bin/$1" "$commands/$1"
}

# Restart what ran. With Type=notify, systemctl waits until it is ready or has failed.
restart_running() {
  for each in $was_active; do systemctl_ restart "$(unit_of "$each")" || return 1; done
}

setup_systemd() {
  for each in $roles; do
    make_account "$each"
    write_units "$each" "$prefix/current"
  done
  systemctl_ daemon-reload
  [ "$start" = yes ] || return 0
  for each in $roles; do systemctl_ enable --quiet "$(unit_of "$each")"; done
}

# ---------------------------------------------------------------------------------------------------------------- verbs

need_systemd() {
  [ "$systemd" = yes ] || return 0
  [ -n "${DESTDIR-}" ] || [ "$dry_run" = yes ] || [ "$(id -u)" = 0 ] || die $ROOM "an account and a unit are root's to make." "sudo; or --no-systemd without them"
  [ -n "${DESTDIR-}" ] || [ "$dry_run" = yes ] || [ -d /run/systemd/system ] || die $MACHINE "systemd does not run here." "--no-systemd installs the programs alone."
}

active_roles() {
  was_active=''
  for each in $roles; do if is_active "$(unit_of "$each")"; then was_active="$was_active $each"; fi; done
}

install_verb() {
  [ -n "$role" ] || { has_role coordinator && ! has_role agent && role=coordinator; } || role=agent
  roles=''
  for each in agent coordinator; do
    if [ "$each" = "$role" ] || has_role "$each"; then roles="$roles $each"; fi
  done
  [ -n "$extras" ] || extras=$(kept extras)
  choose_torch
  if [ "$role" = coordinator ] && [ "$torch" = none ]; then
    die $USAGE "a coordinator prepares and evaluates models, and needs torch for it." "--torch cpu, or leave it out"
  fi
  choose_python
  need_systemd
  find_wheel
  read_constraints
  pin_torch
  identify
  say "$version for $(model | grep . || os_release PRETTY_NAME || true) ($machine, Python $python_version), torch: $torch, into $new"
  if [ -e "$new/.complete" ]; then
    say "it is installed already"
  else
    check_room
    [ "$dry_run" = yes ] || scratch
    run mkdir -p "$versions"
    [ ! -e "$new" ] || run rm -rf "$new" # of a try that was cut short
    unfinished=$new
    run "$python" -m venv "$new" || die $FAILED "$python cannot make an environment." "apt install python3-venv"
    fill
    run touch "$new/.complete"
    unfinished=''
  fi
  active_roles
  before=$(current)
  if [ "$before" != "versions/$name" ]; then
    [ -z "$before" ] || point previous "$before"
    point current "versions/$name"
  fi
  run mkdir -p "$prefix/roles"
  run touch "$prefix/roles/$role"
  printf '%s\n' "python=$python" "systemd=$systemd" "torch=$torch" "torch_index=$torch_index" "extras=$extras" | put "$prefix/settings" 0644
  if [ "$systemd" = yes ]; then
    setup_systemd
    if [ "$before" != "versions/$name" ] && ! restart_running; then
      warn "the new version does not start: journalctl -u 'fleetune-*' -n 50"
      [ -n "$before" ] || exit $BROKEN
      point current "$before"
      for each in $roles; do write_units "$each" "$prefix/current"; done
      systemctl_ daemon-reload
      restart_running || die $BROKEN "neither does the one before." "journalctl -u 'fleetune-*' -n 50"
      die $BROKEN "$before runs again."
    fi
  fi
  prune
  next_steps
}

next_steps() {
  say "done: $prefix/current -> versions/$name"
  if [ "$systemd" = no ]; then
    say "next: $prefix/current/bin/$(program_of "$role") --help"
    return
  fi
  unit=$(unit_of "$role")
  if is_active "$unit"; then return; fi
  if [ "$role" = agent ]; then
    say "next: 1. data into /srv/fleetune, and its names into /etc/fleetune/agent.toml"
    say "      2. sudo -u fleetune-agent fleetune-agent join        (asks for the line of \`fleetune token create\`)"
    say "      3. sudo -u fleetune-agent fleetune-agent doctor"
    say "      4. sudo systemctl start $unit; journalctl -fu $unit"
  else
    say "next: 1. listen and address into /etc/fleetune/coordinator.toml"
    say "      2. sudo -u fleetune fleetune init"
    say "      3. sudo systemctl start $unit; journalctl -fu $unit"
  fi
}

rollback_verb() {
  before=$(readlink "$prefix/previous" 2>/dev/null || true)
  [ -n "$before" ] && [ -e "$prefix/$before/.complete" ] || die $USAGE "there is no version before in $prefix."  "Install one with --wheel."
  need_systemd
  roles=''
  for each in agent coordinator; do if has_role "$each"; then roles="$roles $each"; fi; done
  now=$(current)
  active_roles
  point current "$before"
  point previous "$now"
  if [ "$systemd" = yes ]; then
    for each in $roles; do write_units "$each" "$prefix/current"; done
    systemctl_ daemon-reload
    restart_running || die $BROKEN "$before does not start." "journalctl -u 'fleetune-*' -n 50"
  fi
  say "done: $prefix/current -> $before. A coordinator's database is not older for that: docs/operations.md, 'Upgrade and rollback'."
}

uninstall_verb() {
  [ -e "$prefix/settings" ] || [ "$dry_run" = yes ] || { say "nothing of Fleetune is in $prefix"; exit 0; }
  leaving=''
  for each in agent coordinator; do
    if [ -z "$role" ] || [ "$each" = "$role" ]; then leaving="$leaving $each"; fi
  done
  if [ "$systemd" = yes ]; then
    need_systemd
    for each in $leaving; do
      unit=$(unit_of "$each")
      [ -e "$units/$unit.service" ] || continue
      systemctl_ disable --now --quiet "$unit" || warn "$unit could not be stopped."
      run rm -f "$units/$unit.service" "$units/$unit.service.d/10-board.conf" "$units/$unit.service.d/20-restart-backoff.conf" \
        "$units/$unit.service.d/50-memory.conf"
      [ ! -d "$units/$unit.service.d" ] || run rmdir --ignore-fail-on-non-empty "$units/$unit.service.d"
      program=$(program_of "$each")
      if [ "$(readlink "$commands/$program" 2>/dev/null)" = "$prefix/current/bin/$program" ]; then run rm -f "$commands/$program"; fi
    done
    systemctl_ daemon-reload
  fi
  for each in $leaving; do run rm -f "$prefix/roles/$each"; done
  if [ "$dry_run" = yes ] || { ! has_role agent && ! has_role coordinator; }; then
    run rm -rf "$versions" "$prefix/cache" "$prefix/current" "$prefix/previous" "$prefix/settings" "$prefix/roles"
    [ ! -d "$prefix" ] || run rmdir --ignore-fail-on-non-empty "$prefix"
  fi
  if [ "$systemd" = no ]; then
    say "done; state of people who ran it by hand lies in their ~/.local/state"
    return
  fi
  for each in $leaving; do
    if [ "$purge" = yes ]; then
      run rm -rf "$etc/$each.toml"
      [ ! -d "$etc" ] || run rmdir --ignore-fail-on-non-empty "$etc"
      if [ -z "${DESTDIR-}" ]; then
        run rm -rf "$(state_of "$each")"
        if getent passwd "$(account_of "$each")" >/dev/null; then run userdel "$(account_of "$each")"; fi
      fi
    elif [ -z "${DESTDIR-}" ] && [ -d "$(state_of "$each")" ]; then
      say "kept: $(state_of "$each") and /etc/fleetune/$each.toml; --uninstall --purge removes them, with the identity"
    fi
  done
  say "done"
}

look
choose_systemd
case $verb in
  install) check_machine; install_verb ;;
  rollback) rollback_verb ;;
  uninstall) uninstall_verb ;;
esac
