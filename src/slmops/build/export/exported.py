"""An exported variant's files as a folder that an engine can open, and a session with it in its toolchain.

Steps find their inputs in the cache under digests; engines look for parts by name. So the files are linked into a folder under
their real names: hard links, because some engines refuse a file that a symbolic link leads out of their folder to.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.build.export.formats import Format, format_of
from slmops.build.export.tool_process import ToolProcess, memory_limit
from slmops.build.export.toolchain import ensure, toolchain
from slmops.build.files import link_or_copy, sha256_of_file
from slmops.build.graph import StepContext

#: files of an export step that belong to the variant carry this before their names
ROLE = "variant--"
LOG = "tool.log"
SESSION_LIMIT_S = 3600.0
#: cache folder that toolchains are made in: told by the environment, because where it lies is no part of a result
TOOLCHAINS_VARIABLE = "SLMOPS_CACHE"


@dataclass(frozen=True)
class Exported:
    """A variant in a folder of its own.

    Attributes:
        form: its format; ``folder``: with all its files; ``model``: the one that the engine opens.
        sha256: of all its files together.
    """

    form: Format
    folder: Path
    model: Path
    sha256: str


def digest_of_files(files: Mapping[str, str]) -> str:
    """One digest for several files, from the digest of each by name."""
    digest = hashlib.sha256()
    for name, sha256 in sorted(files.items()):
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()


@contextmanager
def exported(context: StepContext) -> Iterator[Exported]:
    """The variant among a step's inputs. Params of the step: ``runtime``, ``precision``."""
    form = format_of(context.params["runtime"], context.params["precision"])
    parts = {name.removeprefix(ROLE): path for name, path in context.files.items() if name.startswith(ROLE)}
    with tempfile.TemporaryDirectory(prefix=".variant-", dir=context.out) as made:
        folder = Path(made)
        for name, path in parts.items():
            link_or_copy(path, folder / name)
        yield Exported(
            form,
            folder,
            folder / form.model,
            digest_of_files({n: sha256_of_file(p) for n, p in parts.items()}),
        )


@contextmanager
def session(context: StepContext, variant: Exported) -> Iterator[tuple[ToolProcess, dict[str, Any]]]:
    """The variant, loaded by its own binding in its toolchain; and what the binding says of it.

    Raises:
        BuildError: it does not load.
    """
    form = variant.form
    interpreter = interpreter_of(form, context)
    request = {
        "op": "session",
        "folder": str(variant.folder),
        "model": str(variant.model),
        "runtime": form.runtime,
        "precision": form.precision,
    }
    with ToolProcess(
        interpreter,
        form.tool,
        request,
        context.out / LOG,
        memory_bytes=memory_limit(),
        limit_s=SESSION_LIMIT_S,
    ) as tool:
        yield tool, tool.result()


def interpreter_of(form: Format, context: StepContext) -> Path:
    """The toolchain's interpreter; the toolchain is made when it is not there."""
    cache = (
        context.memo.parent
        if context.memo is not None
        else Path(os.environ.get(TOOLCHAINS_VARIABLE, ".slmops-cache"))
    )
    return ensure(toolchain(form.toolchain), cache.absolute(), lambda note: context.progress(None, note))
