#!/usr/bin/env bash
# Say whether this machine runs programs of another processor, and what to do when it does not (exit code 77).
#   deploy/containers/emulated.sh arm64
set -euo pipefail
arch=$1
case $arch in arm64) machine=aarch64 ;; amd64) machine=x86_64 ;; *) machine=$arch ;; esac
[ "$(uname -m)" != "$machine" ] || exit 0
handlers=/proc/sys/fs/binfmt_misc
if [ ! -e "$handlers/qemu-$machine" ]; then
    echo "this machine ($(uname -m)) does not run programs for $arch: apt install qemu-user-static binfmt-support" >&2
    if [ ! -e "$handlers/register" ]; then
        echo "without systemd also: mount -t binfmt_misc binfmt_misc $handlers; update-binfmts --enable qemu-$machine" >&2
    else
        echo "if that is installed: update-binfmts --enable qemu-$machine" >&2
    fi
    exit 77
fi
# F: the kernel holds the emulator itself, so that it is found inside containers, too
grep -q '^flags:.*F' "$handlers/qemu-$machine" || {
    echo "qemu-$machine is registered without flag F, so that containers do not find it: use Debian's qemu-user-static" >&2
    exit 77
}
