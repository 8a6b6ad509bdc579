"""The demo's fleets: which devices there are, what is built for them, and with which engines they serve."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops.core.device.fit import EXTERNAL
from slmops.core.errors import NotFoundError, SlmopsError, UsageError
from slmops.runtimes import load
from slmops.runtimes.environments import VARIABLE
from slmops.runtimes.external.llama_server import MODULE, llama_server_config


@dataclass(frozen=True, slots=True)
class Member:
    """One device; ``runtime`` is the engine that it is held to, empty for any."""

    name: str
    profile: str
    runtime: str = ""


@dataclass(frozen=True, slots=True)
class DemoFleet:
    """What one demo rolls out to whom.

    Attributes:
        members: the devices; ``canary``: the one that gets everything first.
        recipe: file of the project that is built; ``targets``: those of its variants that are, None for all.
        blueprint: file of the project.
    """

    members: tuple[Member, ...]
    canary: str
    recipe: str = "recipe.yaml"
    targets: tuple[str, ...] | None = None
    blueprint: str = "blueprint.yaml"


USUAL = DemoFleet(
    (
        Member("zero-1", "pi-zero2-512mb"),
        Member("zero-2", "pi-zero2-512mb"),
        Member("pi5-1", "pi5-8gb"),
        Member("pi5-2", "pi5-8gb"),
        Member("n100-1", "n100-16gb"),
        Member("n100-2", "n100-16gb"),
    ),
    canary="pi5-1",
)
#: one device for each runtime
_BY_RUNTIME = {
    "llama.cpp": Member("llama-1", "pi5-8gb", "llama.cpp"),
    EXTERNAL: Member("external-1", "pi5-8gb", EXTERNAL),
    "onnxruntime-genai": Member("onnx-1", "n100-16gb", "onnxruntime-genai"),
    "litert-lm": Member("litert-1", "n100-16gb", "litert-lm"),
    "executorch": Member("executorch-1", "n100-16gb", "executorch"),
}


def fleet_for(runtimes: str) -> DemoFleet:
    """The fleet that was asked for.

    Args:
        runtimes: empty for the usual fleet, ``all``, or names with commas between them.

    Raises:
        UsageError: an unknown name.
    """
    if not runtimes:
        return USUAL
    asked = list(_BY_RUNTIME) if runtimes == "all" else [name.strip() for name in runtimes.split(",")]
    unknown = [name for name in asked if name not in _BY_RUNTIME]
    if unknown:
        raise UsageError(
            f"--runtimes: {unknown[0]!r} is not known", hint=f"all, or some of {', '.join(_BY_RUNTIME)}"
        )
    asked = list(dict.fromkeys(["llama.cpp", *asked]))  # the canary, and what all are compared with
    members = tuple(_BY_RUNTIME[name] for name in asked)
    gguf = {"llama.cpp", EXTERNAL}
    keys = [m.profile if m.runtime in gguf else f"{m.profile}@{m.runtime}" for m in members]
    return DemoFleet(
        members,
        canary=members[0].name,
        recipe="runtimes-recipe.yaml",
        targets=tuple(dict.fromkeys(keys)),
        blueprint="runtimes-blueprint.yaml",
    )


def find_environments(members: Sequence[Member], root: Path, work: Path) -> None:
    """Let engines be found that are installed in environments beside this one, as ``make demo`` makes them.

    Args:
        members: whose engines are needed.
        root: the clone, with ``.venv-*`` folders.
        work: where a folder of links to them is made.

    Raises:
        NotFoundError: an engine is installed nowhere; names the command that installs it.
    """
    folder = work / "runtimes"
    folder.mkdir(parents=True, exist_ok=True)
    places = {"executorch": ".venv-executorch"}
    for member in members:
        environment = root / places.get(member.runtime, ".venv-runtimes")
        link = folder / member.runtime
        link.unlink(missing_ok=True)
        if member.runtime not in ("llama.cpp", EXTERNAL) and environment.is_dir():
            link.symlink_to(environment.resolve())
    before = os.environ.get(VARIABLE, "")
    os.environ[VARIABLE] = os.pathsep.join(part for part in (before, str(folder)) if part)
    for member in members:
        if member.runtime == EXTERNAL:
            stock_server(root)
            continue
        try:
            load(member.runtime)
        except SlmopsError as error:
            raise NotFoundError(
                f"{member.name}: {error.message}",
                hint='make demo ARGS="--runtimes ..." installs what it needs, each in an environment of its own',
            ) from error


def stock_server(root: Path) -> Path:
    """llama.cpp's own server from a package.

    Raises:
        NotFoundError: it is not installed.
    """
    given = os.environ.get("SLMOPS_LLAMA_SERVER", "")
    if given:
        return Path(given)
    found = importlib.util.find_spec(MODULE)
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    folders += [str(path) for path in root.glob(f".venv-runtimes/lib/python3.*/site-packages/{MODULE}")]
    for folder in folders:
        program = Path(folder) / "bin" / "llama-server"
        if program.is_file():
            return program
    raise NotFoundError(
        "no llama-server here to play the owner's own server",
        hint="make demo installs one; or name yours: SLMOPS_LLAMA_SERVER=/path/to/llama-server",
    )


def write_external_config(root: Path, path: Path) -> Path:
    """The file that ``agent enroll --external`` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(llama_server_config(stock_server(root)), indent=1), encoding="utf-8")
    return path
