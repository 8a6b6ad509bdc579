#!/usr/bin/env bash
# Build the images localhost/slmops-server and localhost/slmops-agent-RUNTIME with podman (or docker: ENGINE=docker).
#   deploy/containers/build.sh                        server and the llama.cpp agent
#   deploy/containers/build.sh server llama-cpp onnxruntime-genai
#   BASE=localhost/my-python deploy/containers/build.sh
#   ARCH=arm64 deploy/containers/build.sh llama-cpp   for another processor, by qemu: localhost/slmops-agent-llama-cpp:arm64
# BASE's python3 must be of the same minor version as PYTHON (python3.11), which gathers the wheels. Without BASE: what
# debian-base.sh made here, else an image of Docker Hub. Exit code 77: something has to be installed first, and is named.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
engine=${ENGINE:-podman}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
arch=${ARCH:-}
extras=("$@")
[ ${#extras[@]} -gt 0 ] || extras=(server llama-cpp)
command -v "$engine" > /dev/null || { echo "$engine is not installed: apt install podman, or set ENGINE" >&2; exit 77; }
options=()
# in a container of its own kind (CI), a build cannot make another user namespace
[ "$engine" != podman ] || options+=(--isolation="${ISOLATION:-chroot}")
tag=latest
gather=(wheel)
if [ -n "$arch" ]; then
    "$here/emulated.sh" "$arch"
    tag=$arch
    options+=(--platform "linux/$arch")
    case $arch in arm64) machine=aarch64 ;; amd64) machine=x86_64 ;; *) machine=$arch ;; esac
    # pip does not know that a system with a later glibc takes wheels for an earlier one: each is named
    gather=(download --only-binary :all: --platform "manylinux2014_$machine"
        --python-version "$("$python" -c 'import platform; print(platform.python_version())')")
    for minor in $(seq 17 36); do gather+=(--platform "manylinux_2_${minor}_$machine"); done
fi

# one image name may stand for several processors: what counts is the one that is here
processor=${arch:-$(case $(uname -m) in x86_64) echo amd64 ;; aarch64) echo arm64 ;; *) uname -m ;; esac)}
have() { [ "$("$engine" image inspect --format '{{.Architecture}}' "$1" 2> /dev/null)" = "$processor" ]; }
base=${BASE:-localhost/slmops-base:$processor}
[ -n "${BASE:-}" ] || have "$base" || base=docker.io/library/python:3.11-slim-bookworm
have "$base" || "$engine" pull --quiet --platform "linux/$processor" "$base" || {
    echo "no base image $base: name yours with BASE, or make one as root: deploy/containers/debian-base.sh $processor" >&2
    exit 77
}

for extra in "${extras[@]}"; do
    context=$(mktemp -d)
    trap 'rm -rf "$context"' EXIT
    mkdir "$context/wheels"
    constraints=$root/constraints/dev.txt
    case $extra in onnxruntime-genai | litert | litert-lm | executorch) constraints=$root/constraints/runtimes.txt ;; esac
    # our own wheel is named by its path: no index has a say about what slmops is
    "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$context/wheels" "$root"
    own=("$context"/wheels/slmops-*.whl)
    place=--wheel-dir
    [ "${gather[0]}" = wheel ] || place=--dest
    "$python" -m pip "${gather[@]}" --quiet --disable-pip-version-check --constraint "$constraints" \
        "$place" "$context/wheels" "${own[0]}[$extra]"
    cp "$here/Containerfile" "$context/"
    name=slmops-agent-$extra
    [ "$extra" != server ] || name=slmops-server
    "$engine" build "${options[@]}" --build-arg BASE="$base" --build-arg EXTRAS="$extra" \
        --tag "localhost/$name:$tag" --file "$context/Containerfile" "$context"
    rm -rf "$context"
    echo "built localhost/$name:$tag"
done
