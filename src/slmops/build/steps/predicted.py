"""Predicted divergences: what storing a tensor in a type costs, from gradients and inputs, before anything is run.

    KL  ~  1/2 sum over rows i of E[g_i^2] e_i H e_i'       e = stored - w, as the quantiser that writes files would store it

(:mod:`slmops.train.fisher`). Rows share nothing but H, so some of them tell the rest: the half of the sample goes to the rows
whose outputs are felt most, the other half is spread evenly over the others. The errors of these rows can be kept: gradients
are then projected on them (:mod:`slmops.train.projected`), which gives a second prediction.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.artifact.gguf_layout import Tensor
from slmops.build.feedback import Curvature, can_feed_back, curvature, loss, quantise_with_feedback
from slmops.build.gguf_file import GgufFile, open_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.calibrate import Hessians, read_imatrix, unpacked
from slmops.build.steps.sensitivity import PROBE_TYPE, fits, is_quantisable
from slmops.build.steps.tensors import damping_of
from slmops.runtimes.llama_cpp.quantise import dequantise_rows, quantise_rows

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

USES = (
    "slmops.build.feedback",
    "slmops.build.gguf_file",
    "slmops.build.steps.calibrate",
    "slmops.build.steps.sensitivity",
    "slmops.build.steps.tensors",
    "slmops.runtimes.llama_cpp.blocks",
    "slmops.runtimes.llama_cpp.quantise",
)
EMBEDDING = "token_embd.weight"
EMBEDDING_INPUT, TOKEN_SHARE = "embedding input", "token share"
#: kind of error beside the types: plain rounding to the probe type, which is what damage is measured with
PROBE = "probe"
#: rows of the embedding differ more than those of a layer
_MORE_OF_EMBEDDING = 8


@dataclass(frozen=True)
class _Told:
    """One tensor: ``rows`` that stand for all, each for ``weights`` of them; by kind of error its cost, and the errors."""

    rows: NDArray[np.int64]
    weights: NDArray[np.float64]
    costs: dict[str, float]
    errors: dict[str, NDArray[np.float32]]


class _ErrorFile:
    """``errors.npz``, written tensor by tensor: together the errors take more memory than the model."""

    def __init__(self, path: Path) -> None:
        self._file = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def add(self, tensor: str, told: _Told) -> None:
        """Add a tensor; errors are scaled so that float16 keeps the smallest."""
        kinds = list(told.errors)
        errors = np.stack([told.errors[kind] for kind in kinds])
        unit = float(np.abs(errors).max()) or 1.0
        for name, values in (
            ("kinds", np.array(kinds)),
            ("rows", told.rows),
            ("weights", told.weights),
            ("unit", np.array(unit)),
            ("errors", (errors / unit).astype(np.float16)),
        ):
            with self._file.open(zipfile.ZipInfo(f"{tensor}/{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, values, allow_pickle=False)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def predict(context: StepContext) -> dict[str, Any]:
    """Predict the divergence of every tensor in every type.

    Files in: ``model``, ``imatrix``, ``hessians``, ``gradients``. Values in: ``inputs`` (of the step that collected the
    Hessians), ``gradients-facts``. Params: ``types``, ``sample_rows``, ``part`` of ``parts``, maybe ``keep_errors``. Value:
    ``available``, ``reason``, ``kld`` (tensor to type to nats a token) and ``probe``: what plain rounding to the probe type
    costs, which is what the damage steps measure. File out with ``keep_errors``: ``errors.npz``, for each tensor ``kinds``
    (types, and ``PROBE``), ``rows``, ``weights`` and ``errors`` (kinds, rows, columns) in float16, in units of ``unit``.
    """
    facts = context.values["gradients-facts"]
    sink = _ErrorFile(context.out / "errors.npz") if context.params.get("keep_errors") else None
    if not facts["available"]:
        if sink is not None:
            sink.close()
        return {"available": False, "reason": facts["reason"], "kld": {}, "probe": {}}
    importance = read_imatrix(context.files["imatrix"])
    hessians = Hessians(context.files["hessians"], context.values["inputs"]["inputs"])
    tokens = int(context.values["inputs"]["tokens"])
    types, count = list(context.params["types"]), int(context.params["sample_rows"])
    part, parts = int(context.params["part"]), int(context.params["parts"])
    table: dict[str, dict[str, float]] = {}
    probe: dict[str, float] = {}
    with np.load(context.files["gradients"]) as gradients, open_gguf(context.files["model"]) as model:
        # tensors with the same input one after another: its Hessian is read and factored once
        tensors = sorted(
            (tensor for tensor in model.layout.tensors if is_quantisable(tensor)),
            key=lambda tensor: (hessians.name(tensor.name) or "", tensor.name),
        )
        names = sorted({hessians.name(tensor.name) or "" for tensor in tensors})[part::parts]
        mine = [tensor for tensor in tensors if (hessians.name(tensor.name) or "") in names]
        last: tuple[str | None, NDArray[np.float32] | None, Curvature | None] = ("", None, None)
        for index, tensor in enumerate(mine):
            name = hessians.name(tensor.name)
            if name != last[0]:
                triangle = hessians.triangle(tensor.name)
                matrix = None if triangle is None else unpacked(triangle)
                last = (
                    name,
                    matrix,
                    None if matrix is None else curvature(matrix, damping_of(tensor.name), tokens),
                )
            told = _tensor(
                model, tensor, types, count, gradients, last[1], last[2], importance.get(tensor.name)
            )
            probe[tensor.name] = told.costs.pop(PROBE)
            table[tensor.name] = told.costs
            if sink is not None:
                sink.add(tensor.name, told)
            context.progress((index + 1) / len(mine), tensor.name)
    if sink is not None:
        sink.close()
    return {"available": True, "reason": "", "kld": table, "probe": probe}


def _tensor(  # noqa: PLR0913 - one tensor with all that belongs to it
    model: GgufFile,
    tensor: Tensor,
    types: Sequence[str],
    count: int,
    gradients: Mapping[str, NDArray[np.float32]],
    hessian: NDArray[np.float32] | None,
    inputs: Curvature | None,
    importance: NDArray[np.float32] | None,
) -> _Told:
    """What each type does to one tensor; plain rounding to the probe type is there as ``PROBE``."""
    rows = model.rows(tensor)
    felt = np.asarray(gradients[tensor.name], np.float64) if tensor.name in gradients else np.zeros(len(rows))
    looked_up = np.zeros(len(rows))
    by_input = np.zeros(rows.shape[1])
    if tensor.name == EMBEDDING:
        looked_up = np.asarray(gradients[TOKEN_SHARE], np.float64)
        by_input = np.asarray(gradients[EMBEDDING_INPUT], np.float64)
        count *= _MORE_OF_EMBEDDING
    size = 0.0 if hessian is None else float(np.trace(hessian)) / len(hessian)
    chosen, weight = sampled_rows(felt * size + looked_up * by_input.mean(), count)
    sample = np.ascontiguousarray(rows[chosen])

    told = _Told(chosen, weight, {}, {})

    def note(kind: str, blob: bytes, type_name: str) -> None:
        error = dequantise_rows(type_name, blob, sample.shape[1]) - sample
        total = np.zeros(len(sample))
        if hessian is not None:
            total += felt[chosen] * loss(error, hessian)
        total += looked_up[chosen] * (np.square(error, dtype=np.float64) @ by_input)
        told.costs[kind] = 0.5 * float((total * weight).sum())
        told.errors[kind] = error

    for name in types:
        if fits(name, tensor):
            fed = inputs is not None and can_feed_back(name)
            blob = (
                quantise_with_feedback(name, sample, inputs)
                if fed and inputs is not None
                else quantise_rows(name, sample, importance)
            )
            note(name, blob, name)
    note(PROBE, quantise_rows(PROBE_TYPE, sample, importance), PROBE_TYPE)
    return told


def sampled_rows(score: NDArray[np.float64], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which rows stand for all, and for how many each.

    Args:
        score: how much each row matters.
        count: rows to take, at most.
    """
    if len(score) <= count:
        return np.arange(len(score)), np.ones(len(score))
    top = np.sort(np.argsort(-score, kind="stable")[: count // 2])
    others = np.setdiff1d(np.arange(len(score)), top)
    spread = others[np.linspace(0, len(others) - 1, count - len(top)).round().astype(np.int64)]
    chosen = np.concatenate((top, spread))
    weight = np.concatenate((np.ones(len(top)), np.full(len(spread), len(others) / len(spread))))
    return chosen, weight
