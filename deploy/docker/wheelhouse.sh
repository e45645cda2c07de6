#!/bin/sh
# Fills deploy/wheelhouse/ with every wheel of the images, so that they build without a network: docker build --network=none
# --build-arg PIP_ARGS=--no-index. For another processor than this machine's: deploy/wheels.py fill deploy/wheelhouse --role all.
#
#   deploy/docker/wheelhouse.sh [PYTHON]        an interpreter of the images' own version, by default python3.11
#
# pip's own settings hold: its index, its find-links folders. TORCH_INDEX as for deploy/setup.sh.
set -eu
cd "$(dirname "$0")/../.."
python=${1:-python3.11}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
image=$(sed -n 's/^ARG BASE=python:\([0-9]*\.[0-9]*\).*/\1/p' deploy/docker/Dockerfile | head -n 1)
if [ "$version" != "$image" ]; then
  echo "wheelhouse: the images have Python $image, and $python is $version; name another one" >&2
  exit 2
fi
download() { "$python" -m pip download --disable-pip-version-check -q --only-binary=:all: -d deploy/wheelhouse "$@"; }

pins=$(mktemp)
trap 'rm -f "$pins" "$pins.wanted"' EXIT
grep -v '^torch==' constraints.txt >"$pins"
case $(uname -m) in
  aarch64) torch=$(sed -n "s/^torch==\([^ ]*\) ; sys_platform == .*/\1/p" constraints.txt) ;;
  *)
    index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
    torch=$(sed -n "s/^torch==\([^ ]*\) ; sys_platform != .*/\1/p" constraints.txt)
    case ${index##*/} in cpu | cu[0-9]* | rocm* | xpu) torch=$torch+${index##*/} ;; esac
    ;;
esac
# torch first and alone: as a dependency it would come as PyPI's CUDA build.
if [ "$(uname -m)" = aarch64 ]; then
  download --no-deps "torch==$torch"
else
  download --no-deps --no-index "torch==$torch" 2>/dev/null || download --no-deps --index-url "$index" "torch==$torch"
fi
echo "torch==$torch" >>"$pins"
"$python" deploy/docker/requirements.py coordinator train >"$pins.wanted"
# hatchling builds Fleetune's own wheel inside the image.
download --find-links deploy/wheelhouse -c "$pins" -r "$pins.wanted" torch hatchling
echo "$(find deploy/wheelhouse -name '*.whl' | wc -l) wheels, $(du -sm deploy/wheelhouse | cut -f 1) MB in deploy/wheelhouse/"
