#!/usr/bin/env bash
# Build the images localhost/slmops-server and localhost/slmops-agent-RUNTIME with podman (or docker: ENGINE=docker).
#   deploy/containers/build.sh                        server and the llama.cpp agent
#   deploy/containers/build.sh server llama-cpp onnxruntime-genai
#   BASE=localhost/my-python deploy/containers/build.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
engine=${ENGINE:-podman}
base=${BASE:-docker.io/library/python:3.11-slim-bookworm}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
extras=("$@")
[ ${#extras[@]} -gt 0 ] || extras=(server llama-cpp)
command -v "$engine" > /dev/null || { echo "$engine is not installed: apt install podman, or set ENGINE" >&2; exit 2; }
options=()
# in a container of its own kind (CI), a build cannot make another user namespace
[ "$engine" != podman ] || options+=(--isolation="${ISOLATION:-chroot}")

for extra in "${extras[@]}"; do
    context=$(mktemp -d)
    trap 'rm -rf "$context"' EXIT
    mkdir "$context/wheels"
    constraints=$root/constraints/dev.txt
    case $extra in onnxruntime-genai | litert | litert-lm | executorch) constraints=$root/constraints/runtimes.txt ;; esac
    "$python" -m pip wheel --quiet --disable-pip-version-check --constraint "$constraints" \
        --wheel-dir "$context/wheels" "$root[$extra]"
    cp "$here/Containerfile" "$context/"
    name=slmops-agent-$extra
    [ "$extra" != server ] || name=slmops-server
    "$engine" build "${options[@]}" --build-arg BASE="$base" --build-arg EXTRAS="$extra" \
        --tag "localhost/$name" --file "$context/Containerfile" "$context"
    rm -rf "$context"
    echo "built localhost/$name"
done
