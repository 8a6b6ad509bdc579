"""Students: a model whose weights learn, the text they learn from, and writing them back into a GGUF file.

Owns: rows of text without padding, the schedule of the learning rate, checkpoints, and the file. Does not own: what is learned
(``reconstruct``, ``distil``).

Rules it keeps: float32 throughout, one thread, everything random from a seed, so that equal inputs give equal bytes, also when a
run was stopped and went on from its checkpoint.
"""

from __future__ import annotations

import math
import mmap
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slmops.artifact.gguf_layout import parse_gguf
from slmops.core.errors import BaseModelError, BuildError

_STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_WARMUP_RATIO = 0.1


@dataclass(frozen=True)
class TextRow:
    """Several sequences in one row; each sees only itself.

    Attributes:
        tokens, positions: (t,) int64.
        mask: (t, t) bool, True where the row's token may look at the column's.
        places: (t,) int64, each token's index in the whole text, all sequences one after another.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor


def text_rows(sequences: Sequence[Sequence[int]], row_tokens: int, first: int = 0) -> list[TextRow]:
    """Pack sequences, in order, into rows of about so many tokens; ``first``: the place of the first token."""
    rows: list[TextRow] = []
    batch: list[tuple[int, Sequence[int]]] = []
    filled, at = 0, first
    for sequence in sequences:
        if batch and filled + len(sequence) > row_tokens:
            rows.append(_row(batch))
            batch, filled = [], 0
        batch.append((at, sequence))
        filled += len(sequence)
        at += len(sequence)
    if batch:
        rows.append(_row(batch))
    return rows


def _row(batch: Sequence[tuple[int, Sequence[int]]]) -> TextRow:
    tokens = torch.tensor([token for _, sequence in batch for token in sequence])
    positions = torch.cat([torch.arange(len(sequence)) for _, sequence in batch])
    places = torch.cat([torch.arange(at, at + len(sequence)) for at, sequence in batch])
    of = torch.cat([torch.full((len(sequence),), index) for index, (_, sequence) in enumerate(batch)])
    return TextRow(tokens, positions, (of[:, None] == of[None, :]).tril(), places)


def order_of(count: int, epoch: int, seed: int) -> list[int]:
    """The rows' order in an epoch, from seed and epoch alone."""
    order: list[int] = torch.randperm(
        count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    ).tolist()
    return order


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then cosine to zero."""
    warmup = max(1, round(steps * _WARMUP_RATIO))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def begin(seed: int) -> None:
    """One thread and a seed: what equal bytes need."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)


def save_state(path: Path | None, state: Mapping[str, Any]) -> None:
    """Keep a checkpoint, whole or not at all; None keeps none."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".part")
    torch.save(dict(state), staging)
    staging.replace(path)


def load_state(path: Path | None, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A checkpoint of a run with these settings; None when there is none, or another's."""
    if path is None or not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError):
        return None  # cut off by a full disk or a crash: begin again
    return state if state.get("settings") == dict(settings) else None


def write_weights(source: Path, target: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a copy of a GGUF with other values in the same tensors; the caller names the file when it is whole.

    Args:
        source: F16 and F32 tensors.
        target: new file.
        weights: by tensor name, of the source's shapes; tensors that are not named stay as they are.

    Raises:
        BaseModelError: a tensor is quantised, missing, or of another shape.
        BuildError: a value is beyond the range of F16.
    """
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        layout = parse_gguf(content, source.name)
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    shutil.copyfile(source, target)
    with target.open("r+b") as sink:
        for name, values in weights.items():
            tensor = tensors.get(name)
            shape = tuple(reversed(values.shape))
            if tensor is None or tensor.type_name not in _STORED or tensor.shape != shape:
                found = "missing" if tensor is None else f"{tensor.type_name} {tensor.shape}"
                raise BaseModelError(
                    f"{source.name}: {name} is {found}, expected F16 or F32 of {shape}",
                    hint="give the unquantised model that the student was loaded from",
                )
            with np.errstate(over="ignore"):
                stored = values.detach().numpy().astype(_STORED[tensor.type_name])
            if not np.isfinite(stored).all():
                raise BuildError(
                    f"{name}: trained weights beyond the range of F16 (65504)",
                    hint="use a smaller learning_rate",
                )
            sink.seek(tensor.offset)
            sink.write(stored.tobytes())
