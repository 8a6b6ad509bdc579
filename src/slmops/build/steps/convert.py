"""A Hugging Face directory as a GGUF file: F16 matrices, F32 vectors, tokenizer, chat template and licence carried over.

Without torch and without upstream's converter (docs/adr/0014): weights are read from the mapped safetensors in blocks of
rows, so that memory stays small. F16 is what the reference of every build is stored in, so nothing is rounded twice.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from slmops.artifact.safetensors_layout import DTYPE_BYTES, SafeTensor
from slmops.build.gguf_file import NewTensor, in_file_order, padded
from slmops.build.graph import StepContext
from slmops.build.hf.architectures import (
    EMBEDDING,
    ROPE_FACTORS,
    Architecture,
    Number,
    architecture_of,
    converted,
    gguf_names,
    metadata_of,
    rope_factors,
)
from slmops.build.hf.directory import HfModel, mapped, read_model
from slmops.build.hf.tokenizer import Vocabulary, read_vocabulary
from slmops.build.steps.fetch import facts
from slmops.core.errors import BaseModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

USES = (
    "slmops.artifact.gguf_layout",
    "slmops.artifact.safetensors_layout",
    "slmops.build.gguf_file",
    "slmops.build.hf.architectures",
    "slmops.build.hf.directory",
    "slmops.build.hf.sentencepiece",
    "slmops.build.hf.tokenizer",
    "slmops.build.steps.fetch",
)
FILE_TYPE_F16 = 1
_BLOCK_WEIGHTS = 1 << 22
_STORED = {"F16": "<f2", "F32": "<f4"}


def from_hf(context: StepContext) -> dict[str, Any]:
    """Convert. Files in: those of the directory, by name; maybe ``chat-template``. Out: ``base.gguf``.

    Params: ``name`` (of the model), ``licence`` (the recipe's, or None), ``plain_template`` (used when there is no other).
    Value: :func:`slmops.build.steps.fetch.facts`.

    Raises:
        BaseModelError: anything that is not supported; see :func:`check`.
    """
    given = {name: path for name, path in context.files.items() if name != "chat-template"}
    model, architecture, names, vocabulary = _checked(given)
    own = context.files.get("chat-template")
    template = own.read_text(encoding="utf-8") if own is not None else vocabulary.chat_template
    target = context.out / "base.gguf"
    factors = rope_factors(model.config)
    with contextlib.ExitStack() as stack:
        contents = {
            name: stack.enter_context(mapped(path))
            for name, path in given.items()
            if name.endswith(".safetensors")
        }
        sources = {given_name: model.tensors[name] for name, given_name in names.items()}
        tensors = [_planned(name, placed.tensor) for name, placed in sources.items()]
        if factors is not None:
            tensors.append(NewTensor(ROPE_FACTORS, "F32", factors.shape, factors.tobytes))
        ordered = in_file_order(tensors)
        metadata = {
            "general.name": context.params["name"],
            "general.license": context.params["licence"] or model.licence(),
            "general.file_type": FILE_TYPE_F16,
            **metadata_of(model.config, architecture),
        }
        _write_header(
            target, ordered, architecture, metadata, vocabulary, template or context.params["plain_template"]
        )
        with target.open("ab") as sink:
            sink.write(b"\0" * (padded(sink.tell()) - sink.tell()))
            for index, tensor in enumerate(ordered):
                placed_tensor = sources.get(tensor.name)
                written = (
                    sink.write(tensor.make())
                    if placed_tensor is None
                    else _write_tensor(
                        sink, tensor, placed_tensor.tensor, contents[placed_tensor.file], model, architecture
                    )
                )
                sink.write(b"\0" * (padded(written) - written))
                context.progress((index + 1) / len(ordered), f"converting {tensor.name}")
    return facts(target) | {
        "has_chat_template": bool(template),
        "chat_template": "the recipe's" if own is not None else "the model's" if template else "plain",
    }


def check(files: Mapping[str, Path]) -> str:
    """Refuse what :func:`from_hf` would refuse, from headers and small files, before any work.

    Returns: the architecture's name.

    Raises:
        BaseModelError: architecture, setting, dtype or tokenizer that is not supported; damaged or missing files.
    """
    return _checked(files)[1].name


def _checked(files: Mapping[str, Path]) -> tuple[HfModel, Architecture, dict[str, str], Vocabulary]:
    model = read_model(files)
    architecture = architecture_of(model.config)
    names = gguf_names(model.tensors, model.config, architecture)
    metadata_of(model.config, architecture)
    embedding = next(model.tensors[name] for name, given in names.items() if given == EMBEDDING)
    return model, architecture, names, read_vocabulary(model, embedding.tensor.shape[0])


def _planned(name: str, source: SafeTensor) -> NewTensor:
    """A tensor's place in the file; its bytes are written block by block instead of being made at once."""
    kind = "F32" if len(source.shape) < 2 else "F16"
    return NewTensor(name, kind, source.shape[::-1], bytes)


def _write_header(
    target: Path,
    ordered: list[NewTensor],
    architecture: Architecture,
    metadata: Mapping[str, Number],
    vocabulary: Vocabulary,
    template: str,
) -> None:
    writer = GGUFWriter(target, architecture.name)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value:
            writer.add_string(key, value)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for name, token in vocabulary.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    for name, flag in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    writer.add_chat_template(template)
    for tensor in ordered:
        dtype = np.float16 if tensor.type_name == "F16" else np.float32
        kind = GGMLQuantizationType.F16 if tensor.type_name == "F16" else GGMLQuantizationType.F32
        writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(dtype), tensor.size_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_tensor(
    sink: BinaryIO,
    tensor: NewTensor,
    source: SafeTensor,
    content: mmap.mmap,
    model: HfModel,
    architecture: Architecture,
) -> int:
    """Write one tensor and give its bytes."""
    whole = tensor.name != EMBEDDING  # rows of the embedding are never reordered, and it is the large one
    written = 0
    for rows in _blocks(source, content, whole=whole):
        weights = converted(tensor.name, rows, model.config, architecture)
        with np.errstate(over="ignore"):
            stored = weights.astype(_STORED[tensor.type_name])
        if not np.isfinite(stored).all():
            worst = float(np.abs(weights).max())
            raise BaseModelError(
                f"{source.name}: has a weight of {worst:g}, {tensor.type_name} holds finite ones up to "
                f"{np.finfo(stored.dtype).max:g}",
                hint="the weights are damaged, or need a wider type than slmops builds from",
            )
        written += sink.write(stored.tobytes())
    return written


def _blocks(source: SafeTensor, content: mmap.mmap, *, whole: bool) -> Iterator[NDArray[np.float32]]:
    """A tensor as floats: in one piece, or in blocks of rows."""
    rows = source.shape[0]
    columns = max(source.size_bytes // DTYPE_BYTES[source.dtype] // max(rows, 1), 1)
    step = rows if whole else max(_BLOCK_WEIGHTS // columns, 1)
    row_bytes = columns * DTYPE_BYTES[source.dtype]
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        blob = content[source.offset + begin * row_bytes : source.offset + end * row_bytes]
        yield floats_of(source.dtype, blob).reshape(end - begin, *source.shape[1:])


def floats_of(dtype: str, blob: bytes) -> NDArray[np.float32]:
    """Weights of a safetensors dtype as float32, shape (n,)."""
    if dtype == "BF16":
        return (np.frombuffer(blob, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(blob, dtype="<f4" if dtype == "F32" else "<f2").astype(np.float32)
