#!/usr/bin/env bash
# Make the image localhost/slmops-base:ARCH (Debian 12 with Python 3.11) from Debian's own packages, for places that reach
# a Debian mirror and no registry of images. As root; for another processor it needs qemu (see emulated.sh).
#   deploy/containers/debian-base.sh            for this machine's processor
#   deploy/containers/debian-base.sh arm64      MIRROR=http://deb.debian.org/debian
# Then: BASE=localhost/slmops-base:arm64 ARCH=arm64 deploy/containers/build.sh llama-cpp
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
engine=${ENGINE:-podman}
command -v "$engine" > /dev/null || { echo "$engine is not installed: apt install podman, or set ENGINE" >&2; exit 77; }
command -v debootstrap > /dev/null || { echo "debootstrap is not installed: apt install debootstrap" >&2; exit 77; }
[ "$(id -u)" = 0 ] || { echo "debootstrap needs root" >&2; exit 77; }
arch=${1:-$(dpkg --print-architecture)}
"$here/emulated.sh" "$arch"
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
log=$(mktemp)
if ! debootstrap --arch="$arch" --variant=minbase --include=python3,python3-venv,libgomp1 \
    bookworm "$root" "${MIRROR:-http://deb.debian.org/debian}" > "$log" 2>&1; then
    tail -5 "$log" >&2
    echo "debootstrap failed: see $log" >&2
    exit 1
fi
rm -rf "$log" "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
case $engine in
    podman) tar -C "$root" -c . | podman import --quiet --arch "$arch" --os linux - "localhost/slmops-base:$arch" ;;
    *) tar -C "$root" -c . | "$engine" import --platform "linux/$arch" - "localhost/slmops-base:$arch" ;;
esac
echo "made localhost/slmops-base:$arch"
