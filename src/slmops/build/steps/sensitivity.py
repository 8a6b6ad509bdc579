"""Sensitivity tables: how large each tensor's error is in each type, and what an error in each part of the model costs.

A type may also **swallow the change** that a merge made: weights that lie near the grid of the base's own type are rounded
back onto it, and the fine-tune is gone although the error is tiny (seen with a Q4_1 base: Q4_1, Q5_1, Q4_K and Q5_K lose
40 to 90 % of a small adapter, IQ4_NL and Q5_0 next to nothing). So the part of the error that undoes the change is measured, too.

Errors are estimated on evenly spaced rows. Costs are measured: one group of tensors after another is stored in the probe
type, the others stay exact, and the KL divergence from the unchanged model is taken on calibration text (never on the
held-out text that judges the result). See :mod:`slmops.core.search.sensitivity` for what is made of both.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.artifact.gguf_layout import GGML_TYPES, TYPE_IDS, Tensor
from slmops.build.gguf_file import GgufFile, open_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.calibrate import read_imatrix
from slmops.build.steps.divergence import KeptText, log_softmax
from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp.logits import LogitModel
from slmops.runtimes.llama_cpp.quantise import dequantise_rows, quantise_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

USES = (
    "slmops.build.gguf_file",
    "slmops.build.steps.calibrate",
    "slmops.build.steps.divergence",
    "slmops.runtimes.llama_cpp.quantise",
    "slmops.runtimes.llama_cpp.logits",
)
#: quantises fastest by far, and legal wherever anything is
PROBE_TYPE = "Q4_0"
DEPTHS = 3
#: bulk comparisons, in which every model is run alike, may use larger batches than scores that must be equal to the bit
BATCH_TOKENS = 256
#: how often each part halves its worst group
SPLITS = 5
_LAYER = re.compile(r"^blk\.(\d+)\.(.+)$")


def errors(context: StepContext) -> dict[str, Any]:
    """What each type does to each tensor.

    Files in: ``model``, ``imatrix``, ``base`` (the untouched base). Params: ``types``, ``sample_rows``. Value: for each tensor
    ``error`` (type to relative error: sum of imatrix * (stored - w)^2 over sum of imatrix * w^2), ``change`` (the same with
    the base in place of the stored weights) and ``swallowed`` (type to the share of the change that is undone, squared,
    times the share of the error that lies along the change: 0 for errors that have nothing to do with it).
    """
    importance = read_imatrix(context.files["imatrix"])
    types, sample = (
        [*dict.fromkeys([*context.params["types"], PROBE_TYPE])],
        int(context.params["sample_rows"]),
    )
    table: dict[str, dict[str, Any]] = {}
    with open_gguf(context.files["model"]) as model, open_gguf(context.files["base"]) as base:
        tensors = [tensor for tensor in model.layout.tensors if is_quantisable(tensor)]
        for index, tensor in enumerate(tensors):
            rows = sample_of(model, tensor, sample)
            change = (
                rows - sample_of(base, base_tensor, sample)
                if (base_tensor := base.tensor(tensor.name)) is not None
                else np.zeros_like(rows)
            )
            table[tensor.name] = losses_of(
                [name for name in types if fits(name, tensor)], rows, change, importance.get(tensor.name)
            )
            context.progress((index + 1) / len(tensors), tensor.name)
    return table


def damage(context: StepContext) -> dict[str, Any]:
    """Measured KL divergence of each group of tensors in the probe type, and of undoing all changes.

    Files in: ``model``, ``text``, ``imatrix``, ``base``. Params: ``probe_tokens``, ``part`` of ``parts``: which groups this step
    measures, so that two steps can share the work. Value: ``groups``: list of ``{"tensors", "damage"}``; ``undone``: divergence
    of the untouched base from the model (in part 0, else None).
    """
    importance = read_imatrix(context.files["imatrix"])
    sequences = _probe_text(context.files["text"], int(context.params["probe_tokens"]))
    scratch = context.out / ".scratch.gguf"
    shutil.copyfile(context.files["model"], scratch)
    scratch.chmod(0o600)
    with open_gguf(context.files["model"]) as model, scratch.open("r+b", buffering=0) as sink:
        tensors = {tensor.name: tensor for tensor in model.layout.tensors if is_quantisable(tensor)}
        mine = groups_of(list(tensors))[context.params["part"] :: context.params["parts"]]
        exact = KeptText(_logprobs(context.files["model"], sequences))
        done, total = 0, len(mine) + SPLITS

        def measure(group: Sequence[str]) -> float:
            nonlocal done
            for name in group:
                patch(sink, tensors[name], _probed(model, tensors[name], importance.get(name)))
            value = exact.mean_divergence(_logprobs(scratch, sequences))
            for name in group:
                patch(sink, tensors[name], model.blob(tensors[name]))
            done += 1
            context.progress(done / total, f"{_title(group)}: KL divergence {value:.4f}")
            return value

        measured = split_worst([(group, measure(group)) for group in mine], measure, SPLITS)
        undone = (
            exact.mean_divergence(_logprobs(context.files["base"], sequences))
            if context.params["part"] == 0
            else None
        )
    scratch.unlink()
    return {
        "groups": [{"tensors": list(group), "damage": value} for group, value in measured],
        "undone": undone,
    }


def split_worst(
    measured: Sequence[tuple[tuple[str, ...], float]], measure: Callable[[Sequence[str]], float], splits: int
) -> list[tuple[tuple[str, ...], float]]:
    """Halve the group of most damage, again and again: one tensor of massive activations often makes most of it.

    Only one half is measured; the other is taken as the rest, because damages add up. (On SmolLM2-135M one of ten ffn_down
    tensors made three quarters of its group's damage, and 30 % of all.)

    Args:
        measured: groups with their damage.
        measure: gives the damage of some tensors.
        splits: how often to halve.
    """
    groups = list(measured)
    for _ in range(splits):
        index = max(
            (i for i, (group, _) in enumerate(groups) if len(group) > 1),
            key=lambda i: groups[i][1],
            default=None,
        )
        if index is None:
            break
        group, value = groups.pop(index)
        middle = len(group) // 2
        first = min(measure(group[:middle]), value)
        groups += [(group[:middle], first), (group[middle:], value - first)]
    return groups


def is_quantisable(tensor: Tensor) -> bool:
    """Whether a tensor of the F16 reference is a weight matrix that may be stored in fewer bits."""
    return len(tensor.shape) >= 2 and tensor.name.endswith(".weight") and fits(PROBE_TYPE, tensor)


def fits(type_name: str, tensor: Tensor) -> bool:
    """Whether a type's blocks divide the tensor's rows."""
    return tensor.shape[0] % GGML_TYPES[TYPE_IDS[type_name]][1] == 0


def sample_of(model: GgufFile, tensor: Tensor, count: int) -> NDArray[np.float32]:
    """Evenly spaced rows, shape (at most ``count``, columns); four times as many of the embedding, whose rows differ most."""
    rows = tensor.elements // tensor.shape[0]
    wanted = min(rows, count * (4 if _LAYER.match(tensor.name) is None else 1))
    chosen = np.linspace(0, rows - 1, wanted).round().astype(np.int64)
    return np.asarray(model.rows(tensor)[chosen])


def losses_of(
    types: Sequence[str],
    rows: NDArray[np.float32],
    change: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
) -> dict[str, Any]:
    """The entry of one tensor in :func:`errors`.

    Args:
        types: legal for these rows.
        rows: shape (n, columns); ``change``: what was added to the base's rows, same shape.
        change: see above.
        importance: shape (columns,), or None for equal weights.
    """
    weights = (
        np.ones(rows.shape[1], dtype=np.float64) if importance is None else importance.astype(np.float64)
    )

    def inner(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        return float((np.multiply(a, b, dtype=np.float64) * weights).sum())

    size, changed = inner(rows, rows), inner(change, change)
    error, swallowed = {}, {}
    for name in types:
        lost = dequantise_rows(name, quantise_rows(name, rows, importance), rows.shape[1]) - rows
        squared, along = inner(lost, lost), -inner(lost, change)
        error[name] = squared / size if size > 0 else 0.0
        undone = along / changed if changed > 0 else 0.0
        aligned = along * along / (squared * changed) if squared > 0 and changed > 0 else 0.0
        swallowed[name] = min(max(undone, 0.0), 1.0) ** 2 * aligned
    return {"error": error, "swallowed": swallowed, "change": changed / size if size > 0 else 0.0}


def groups_of(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Tensors of one kind in one third of the depth; tensors outside the layers each alone."""
    layers = 1 + max((int(match[1]) for name in names if (match := _LAYER.match(name))), default=0)
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        key = (match[2], int(match[1]) * DEPTHS // layers) if match else (name, 0)
        groups.setdefault(key, []).append(name)
    return [tuple(groups[key]) for key in sorted(groups)]


def _title(group: Sequence[str]) -> str:
    return group[0] if len(group) == 1 else f"{group[0]} and {len(group) - 1} more"


def _probed(model: GgufFile, tensor: Tensor, importance: NDArray[np.float32] | None) -> bytes:
    rows = model.rows(tensor)
    stored = dequantise_rows(PROBE_TYPE, quantise_rows(PROBE_TYPE, rows, importance), rows.shape[1])
    return stored.astype("<f2").tobytes()


def patch(sink: Any, tensor: Tensor, blob: bytes | memoryview) -> None:
    """Overwrite a tensor in the scratch file; sizes are equal, so a mapping of the file stays valid."""
    if len(blob) != tensor.size_bytes:
        raise BuildError(
            f"{tensor.name}: the reference is {tensor.type_name}, expected F16", hint="report it"
        )
    sink.seek(tensor.offset)
    sink.write(blob)


def _probe_text(path: Path, tokens: int) -> list[list[int]]:
    sequences: list[list[int]] = []
    for token_ids in json.loads(path.read_text(encoding="utf-8")):
        if sum(map(len, sequences)) >= tokens:
            break
        sequences.append(token_ids)
    return sequences


def _logprobs(path: Path, sequences: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
    longest = max(map(len, sequences))
    context = math.ceil(longest / 64) * 64
    with LogitModel(path, context_tokens=context, threads=1, batch_tokens=BATCH_TOKENS) as model:
        for token_ids in sequences:
            yield log_softmax(model.logits(token_ids)[:-1])
