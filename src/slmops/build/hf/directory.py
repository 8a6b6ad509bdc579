"""A Hugging Face model directory: which files it needs, and what of it is refused before any work.

Reads headers and small JSON files only. Pickled weights (``.bin``, ``.pt``) are refused because loading them runs code that
the file brings along. Everything that a conversion reads is listed by :func:`needed_files`, so that a build's inputs are all
known by digest.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.artifact.safetensors_layout import SafeTensor, parse_safetensors
from slmops.core.errors import BaseModelError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZER_JSON, TOKENIZER_MODEL, TOKENIZER_CONFIG = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
#: read when they are there
OPTIONAL = (
    "generation_config.json",
    "chat_template.jinja",
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    "README.md",
)
FLOATS = ("F32", "F16", "BF16")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_README_LICENCE = re.compile(r"\A---\n.*?^license:\s*[\"']?([\w.+-]+)", re.MULTILINE | re.DOTALL)
_README_NAMED = re.compile(r"\A---\n.*?^license_name:\s*[\"']?([\w.+-]+)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor and the file that holds it."""

    file: str
    tensor: SafeTensor


@dataclass(frozen=True)
class HfModel:
    """What a directory says, checked.

    Attributes:
        files: path of each file by its name in the directory.
        config: ``config.json``, with a text model's own section lifted out of it.
        tensors: every tensor by name.
    """

    files: Mapping[str, Path]
    config: Mapping[str, Any]
    tensors: Mapping[str, PlacedTensor]

    def document(self, name: str) -> dict[str, Any]:
        """One of its JSON files; empty when it is not there."""
        return read_json(self.files[name]) if name in self.files else {}

    def licence(self) -> str:
        """The licence that the model card's header names; empty when there is none."""
        if "README.md" not in self.files:
            return ""
        text = self.files["README.md"].read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        found = _README_LICENCE.match(text)
        if found is not None and found[1] == "other":
            found = _README_NAMED.match(text) or found
        return found[1] if found else ""


def needed_files(folder: Path) -> dict[str, Path]:
    """The files of a directory that a conversion reads, by name.

    Raises:
        BaseModelError: no such directory, no config, no safetensors, a shard that is missing, pickled weights only.
    """
    if not folder.is_dir():
        raise BaseModelError(
            f"{folder} is no directory (the recipe's base.hf)",
            hint="give the folder with config.json and the .safetensors files; for one GGUF file write base: {gguf: FILE}",
        )
    if not (folder / CONFIG).is_file():
        raise BaseModelError(
            f"{folder} has no {CONFIG}",
            hint="give a whole Hugging Face directory (save_pretrained makes one)",
        )
    names = [CONFIG, *(name for name in OPTIONAL if (folder / name).is_file())]
    if not ({TOKENIZER_JSON, TOKENIZER_MODEL} & set(names)):
        raise BaseModelError(
            f"{folder} has neither {TOKENIZER_JSON} nor {TOKENIZER_MODEL}",
            hint="save the tokenizer beside the model: tokenizer.save_pretrained(DIR)",
        )
    if (folder / INDEX).is_file():
        shards = sorted({*_weight_map(folder / INDEX).values()})
        names += [INDEX, *shards]
        for shard in shards:
            if not (folder / shard).is_file():
                raise BaseModelError(
                    f"{folder / INDEX} names {shard}, which is not in {folder}",
                    hint=f"fetch the missing shard; the index names {len(shards)}",
                    path=str(folder / shard),
                )
    elif (folder / SINGLE).is_file():
        names.append(SINGLE)
    else:
        raise _no_weights(folder)
    return {name: folder / name for name in names}


def read_model(files: Mapping[str, Path]) -> HfModel:
    """Read config and every weight file's header.

    Args:
        files: as :func:`needed_files` gives them; only names and contents count, not where the files lie.

    Raises:
        BaseModelError: damaged files; an index that its shards do not bear out; a dtype that is no float.
    """
    config = read_json(files[CONFIG])
    _refuse_quantised(config, str(files[CONFIG]))
    text = config.get("text_config")
    if isinstance(text, dict):
        config = {**config, **text, "architectures": config.get("architectures")}
    tensors: dict[str, PlacedTensor] = {}
    weights = [SINGLE] if INDEX not in files else sorted(name for name in files if _is_weight(name))
    for name in weights:
        with mapped(files[name]) as content:
            for tensor in parse_safetensors(content, name):
                if tensor.name in tensors:
                    raise BaseModelError(
                        f"tensor {tensor.name!r} is in {tensors[tensor.name].file} and in {name}",
                        hint="the shards do not belong together: fetch them again",
                    )
                if tensor.dtype not in FLOATS:
                    raise BaseModelError(
                        f"{name}: tensor {tensor.name!r} has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}",
                        hint="give the unquantised model (float16, bfloat16 or float32): slmops quantises it itself",
                    )
                tensors[tensor.name] = PlacedTensor(name, tensor)
    if INDEX in files:
        _check_index(_weight_map(files[INDEX]), tensors)
    return HfModel(files, config, tensors)


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """A file's bytes, mapped.

    Raises:
        BaseModelError: it is empty.
    """
    with path.open("rb") as source:
        if path.stat().st_size == 0:
            raise BaseModelError(f"{path} is empty, expected safetensors", hint="fetch the file again")
        content = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        yield content
    finally:
        content.close()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BaseModelError: it is none; names file, line and column.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BaseModelError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}", hint="fetch the file again"
        ) from error
    except UnicodeDecodeError as error:
        raise BaseModelError(
            f"{path}: not UTF-8 text: {error.reason}", hint="fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path}: expected a JSON object", hint="fetch the file again")
    return value


def _is_weight(name: str) -> bool:
    return name.endswith(".safetensors")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name, as the index says; a file name must be one, never a path."""
    value = read_json(index).get("weight_map")
    if not isinstance(value, dict) or not value:
        raise BaseModelError(f"{index}: has no weight_map", hint="fetch the file again")
    for tensor, shard in value.items():
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or not _is_weight(shard):
            raise BaseModelError(
                f"{index}: weight_map[{tensor!r}] is {shard!r}, expected a name like model-00001-of-00002.safetensors",
                hint="fetch the index again; weights must be safetensors in the same folder",
            )
    return {str(tensor): str(shard) for tensor, shard in value.items()}


def _check_index(index: Mapping[str, str], tensors: Mapping[str, PlacedTensor]) -> None:
    for name, shard in index.items():
        found = tensors.get(name)
        if found is None or found.file != shard:
            raise BaseModelError(
                f"{INDEX} says that {name!r} is in {shard}, "
                + ("no shard has it" if found is None else f"it is in {found.file}"),
                hint="index and shards are not of one model: fetch both again",
            )


def _refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict):
        method = quantised.get("quant_method", "unknown")
        raise BaseModelError(
            f"{where}: the weights are already quantised (quant_method {method!r})",
            hint="give the unquantised model: slmops quantises it itself, and better from full precision",
        )


def _no_weights(folder: Path) -> BaseModelError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    shards = sorted(path.name for path in folder.glob("*.safetensors") if _SHARD.fullmatch(path.name))
    if pickles:
        return BaseModelError(
            f"{folder} has its weights in {pickles[0]}, a Python pickle: loading one runs code from the file, so it is refused",
            hint="convert it on a machine that may run it: model.save_pretrained(DIR, safe_serialization=True)",
        )
    if shards:
        return BaseModelError(
            f"{folder} has {shards[0]} but no {INDEX}",
            hint="fetch the index too: it says which shard holds which tensor",
        )
    return BaseModelError(f"{folder} has no {SINGLE}", hint="give a directory with safetensors weights")
