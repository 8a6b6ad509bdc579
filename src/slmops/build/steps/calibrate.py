"""The importance matrix: mean squared activation of every weight matrix's inputs, on the calibration text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.build.graph import StepContext
from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp.imatrix import collect_imatrix

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

USES = ("slmops.runtimes.llama_cpp.imatrix",)
WINDOW_TOKENS = 256


def imatrix(context: StepContext) -> dict[str, Any]:
    """Collect it. Files in: ``model``, ``text``; out: ``imatrix.npz``, one float32 vector a tensor. Value: ``tokens``."""
    sequences = json.loads(context.files["text"].read_text(encoding="utf-8"))
    token_ids = [token for sequence in sequences for token in sequence]
    window = min(WINDOW_TOKENS, len(token_ids))
    if window < 2:
        raise BuildError(
            "the calibration text has no tokens", hint="give some 100 sentences in task.calibration"
        )
    context.progress(None, f"{len(token_ids)} calibration tokens")
    collected = collect_imatrix(context.files["model"], token_ids, window_tokens=window, threads=1)
    _write(context.out / "imatrix.npz", collected.sums)
    return {"tokens": collected.tokens, "tensors": len(collected.sums)}


def read_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """Tensor name to mean squared activations, shape (columns,)."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def _write(path: Path, vectors: dict[str, NDArray[np.float32]]) -> None:
    np.savez(path, **{name: vectors[name] for name in sorted(vectors)})  # type: ignore[arg-type]
