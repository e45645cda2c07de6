#!/bin/sh
# One step of the images' build: packages into /opt/venv, and what the step has added into /opt/new, to be a layer of its own.
#
#   packages.sh core | torch | train | coordinator | fleetune
#
# Wheels are looked for in /wheelhouse first and in pip's index otherwise; PIP_ARGS=--no-index leaves the index out, for a build
# without a network. pip's own variables (PIP_INDEX_URL, ...) hold. TORCH_INDEX: where torch comes from on x86_64.
set -eu
cd "$(dirname "$0")" # in the image, with constraints.txt and the requirements beside it

venv=/opt/venv new=/opt/new tools=/opt/tools
# No pip inside the images: one in a place of its own is told where to install.
pip() {
  verb=$1
  shift
  "$tools/bin/python" -m pip --python "$venv/bin/python" "$verb" --disable-pip-version-check --no-cache-dir --root-user-action=ignore -q "$@"
}
# shellcheck disable=SC2086 # PIP_ARGS is a list of words
install() { pip install --find-links /wheelhouse ${PIP_ARGS-} "$@"; }

version_of() { "$venv/bin/python" -c "from importlib.metadata import version; print(version('$1'))" 2>/dev/null || true; }

pins() {
  grep -v '^torch==' constraints.txt
  torch=$(version_of torch)
  printf 'torch==%s\n' "${torch:-0}" # no such version: a light image that asked for torch would fail
}

# The version that constraints.txt pins for this machine. From 2.11 on, PyPI's wheels for aarch64 are CUDA builds.
torch() {
  machine=$(uname -m)
  if [ "$machine" = aarch64 ]; then
    install --no-deps "torch==$(sed -n "s/^torch==\([^ ]*\) ; sys_platform == .*/\1/p" constraints.txt)"
    return
  fi
  pinned=$(sed -n "s/^torch==\([^ ]*\) ; sys_platform != .*/\1/p" constraints.txt)
  index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
  # pytorch.org marks each build. With the mark, no other index can slip its CUDA build in, gigabytes that nobody here can run.
  case ${index##*/} in cpu | cu[0-9]* | rocm* | xpu) pinned=$pinned+${index##*/} ;; esac
  pip install --no-deps --no-index --find-links /wheelhouse "torch==$pinned" && return
  case " ${PIP_ARGS-} " in *" --no-index "*)
    echo "packages: no torch $pinned in deploy/wheelhouse/; deploy/docker/wheelhouse.sh fills it" >&2
    exit 1
    ;;
  esac
  pip install --no-deps --index-url "$index" "torch==$pinned"
}

# Headers, build files and the packages' own tests: nothing here compiles or tests them.
trim() {
  for site in "$venv"/lib/python3.*/site-packages; do
    rm -rf "$site/torch/include" "$site/torch/share" "$site"/torch/lib/*.a
    find "$site" -path '*/site-packages/*/tests' -type d \( -path '*/numpy/*' -o -path '*/scipy/*' -o -path '*/sympy/*' -o -path '*/networkx/*' \) \
      -prune -exec rm -rf {} +
  done
}

mark=$(mktemp)
[ -x "$tools/bin/python" ] || python3 -m venv "$tools"
[ -x "$venv/bin/python" ] || python3 -m venv --without-pip "$venv"
# Times of inodes: pip gives some files the time they had when they were packed.
sleep 0.05
touch "$mark"
sleep 0.05
wanted=$(mktemp)
pinned=$(mktemp)
pins >"$pinned"
case $1 in
  core | coordinator) cat "$1.txt" >"$wanted" ;;
  torch)
    : >"$wanted"
    torch
    ;;
  train) { cat train.txt && echo torch; } >"$wanted" ;; # torch is there: this is for what it needs
  fleetune)
    : >"$wanted"
    install --no-deps .
    ;;
  *)
    echo "packages: there is no step $1" >&2
    exit 2
    ;;
esac
[ ! -s "$wanted" ] || install -c "$pinned" -r "$wanted"
trim
mkdir -p "$new"
(cd "$venv" && find . \( -type f -o -type l \) -cnewer "$mark" -print0 | tar --null -T - -cf -) | tar -C "$new" -xf -
rm -f "$mark" "$wanted" "$pinned"
