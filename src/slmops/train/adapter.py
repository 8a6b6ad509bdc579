"""The GGUF file of a LoRA adapter: writing it, and reading it back.

llama.cpp's format (``src/llama-adapter.cpp``; written upstream by ``convert_lora_to_gguf.py``):

- header: ``general.type`` = ``adapter``, ``general.architecture`` = the base's, ``adapter.type`` = ``lora``,
  ``adapter.lora.alpha`` (float32);
- for each adapted tensor of the base, named ``T`` (``blk.0.attn_q.weight``), a pair ``T.lora_a``,
  ``T.lora_b``.

**Arithmetic of merging** (done with numpy in ``build``, where torch is absent). Axis order first: GGUF writes
a tensor's dimensions fastest first, numpy last. As numpy sees them after reading,

    W  has shape (out, in)      A = T.lora_a has shape (rank, in)      B = T.lora_b has shape (out, rank)

and the merged weight, in float32 or better, is

    W' = W + scale · (alpha / rank) · (B @ A)           rank = A.shape[0], scale = 1 unless the user says
    otherwise

No permutation of Q and K is needed: base and adapter both use llama.cpp's interleaved rotary layout. The
engine applies the same pair without merging as  y = W x + scale · (alpha / rank) · B (A x).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize

from slmops.core.errors import BaseModelError
from slmops.train.lora import LoraWeights

SUFFIX_A = ".weight.lora_a"
SUFFIX_B = ".weight.lora_b"


def write_adapter(path: Path, lora: LoraWeights, architecture: str, header: Mapping[str, str]) -> None:
    """Write the adapter in float16, whole or not at all.

    Args:
        path: the new file; a file there is replaced.
        lora: trained pairs.
        architecture: ``general.architecture`` of the base.
        header: further text keys, e.g. ``general.name``, ``general.license``.
    """
    staging = path.with_name(path.name + ".part")
    writer = GGUFWriter(staging, architecture)  # writes general.architecture
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", lora.alpha)
    for key in sorted(header):
        writer.add_string(key, header[key])
    for name, a in lora.a.items():
        writer.add_tensor(name + SUFFIX_A, _half(a))
        writer.add_tensor(name + SUFFIX_B, _half(lora.b[name]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with staging.open("rb") as written:
        os.fsync(written.fileno())
    staging.replace(path)


def read_adapter(path: Path, lora: LoraWeights) -> None:
    """Load an adapter file into ``lora``, whose rank and layers must be the file's.

    Raises:
        BaseModelError: the file is no LoRA adapter, or its tensors differ from what ``lora`` has.
    """
    reader = GGUFReader(path)
    kind = reader.get_field("adapter.type")
    alpha = reader.get_field("adapter.lora.alpha")
    if kind is None or kind.contents() != "lora" or alpha is None:
        raise BaseModelError(f"{path}: not a LoRA adapter", hint="give a GGUF file with adapter.type = lora")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    expected = {name + suffix for name in lora.a for suffix in (SUFFIX_A, SUFFIX_B)}
    if set(tensors) != expected:
        differing = sorted(set(tensors) ^ expected)
        raise BaseModelError(
            f"{path}: expected {len(expected)} tensors, got {len(tensors)}; first difference: {differing[0]}",
            hint="the adapter belongs to another base",
        )
    lora.alpha = float(alpha.contents())
    for leaves, suffix in ((lora.a, SUFFIX_A), (lora.b, SUFFIX_B)):
        for name, leaf in leaves.items():
            tensor = tensors[name + suffix]
            values = torch.from_numpy(
                np.array(_values(np.asarray(tensor.data), tensor.tensor_type), np.float32)
            )
            if values.shape != leaf.shape:
                raise BaseModelError(
                    f"{path}: {tensor.name} should be {tuple(leaf.shape)}, got {tuple(values.shape)}",
                    hint="give the rank that the adapter was trained with",
                )
            with torch.no_grad():
                leaf.copy_(values)


def _half(leaf: torch.Tensor) -> npt.NDArray[np.float16]:
    half: npt.NDArray[np.float16] = leaf.detach().numpy().astype(np.float16)
    return half


def _values(stored: npt.NDArray[np.generic], kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = dequantize(stored, kind)
    return values
