"""The step graph: what depends on what, and the key under which a result is cached.

A step is a pure function of its inputs' digests, its parameters, its code and the versions of its tools. It does not
know who else uses its result, nor where it runs, so the same graph can be run in one process, in several, or elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.artifact.digest import digest_of
from slmops.core.errors import BugError

#: distributions whose version may change a result
TOOLS = ("gguf", "numpy", "xllamacpp")


@dataclass(frozen=True, slots=True)
class Output:
    """What another step gives: one of its files, or (without a file name) its JSON value.

    A file name that ends in ``*`` stands for all files that begin so, for steps whose files are known only when they have
    run: they come under their own names, and the input's name is not used.
    """

    step: str
    file: str = ""

    @property
    def is_many(self) -> bool:
        """Whether it stands for several files."""
        return self.file.endswith("*")

    def pick(self, names: Iterable[str]) -> list[str]:
        """Those of a step's files that it stands for, in order."""
        return sorted(name for name in names if name.startswith(self.file[:-1]))


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the user's, by digest; it must not change while the build runs."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        name: for people and for :class:`Output`; not part of the key.
        run: ``module:function``; the function takes a :class:`StepContext` and returns a JSON value.
        inputs: by the name under which the function finds them.
        params: JSON values.
        exclusive: measures time, so nothing else runs beside it.
        light: so short that a process of its own would cost more.
    """

    name: str
    run: str
    inputs: Mapping[str, Output | SourceFile] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    exclusive: bool = False
    light: bool = False


@dataclass(frozen=True)
class StepContext:
    """What a step's function is given.

    Attributes:
        files: input files by name; ``values``: input JSON values by name.
        params: JSON values.
        out: empty folder; files that are left here are the step's files.
        progress: call with a ratio 0..1 (or None) and a note.
        memo: folder of pieces that steps share (:mod:`slmops.build.memo`); None shares nothing, with the same results.
        checkpoints: for steps that train: made by the step, kept when the step is killed, removed when it ended well.
    """

    files: Mapping[str, Path]
    values: Mapping[str, Any]
    params: Mapping[str, Any]
    out: Path
    progress: Callable[[float | None, str], None]
    memo: Path | None = None
    checkpoints: Path | None = None


def resolve(run: str) -> Callable[[StepContext], Any]:
    """The function that ``module:function`` names."""
    module_name, _, attribute = run.partition(":")
    function: Callable[[StepContext], Any] = getattr(importlib.import_module(module_name), attribute)
    return function


@functools.cache
def code_digest(run: str) -> str:
    """Digest of the sources that a step's result depends on: its module and those that the module names in ``USES``."""
    module_name = run.partition(":")[0]
    uses: tuple[str, ...] = getattr(importlib.import_module(module_name), "USES", ())
    digest = hashlib.sha256()
    for name in (module_name, *sorted(uses)):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise BugError(f"{module_name}: USES names {name}, which is no module")
        digest.update(name.encode() + b"\0" + Path(spec.origin).read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in TOOLS} | {"machine": platform.machine()}


def tool_versions() -> dict[str, str]:
    """Versions of the tools, and the machine's architecture (kernels differ in the last bits between architectures)."""
    return dict(_versions())


def key_of(step: Step, input_digests: Mapping[str, str]) -> str:
    """The key under which a step's result is cached."""
    return digest_of(
        {
            "run": step.run,
            "code": code_digest(step.run),
            "params": step.params,
            "inputs": input_digests,
            "tools": tool_versions(),
        }
    )
