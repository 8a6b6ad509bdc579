"""Predicted divergences from whole gradients: projected on the errors themselves. Needs torch.

KFAC (:mod:`slmops.train.fisher`) takes gradients and inputs as independent. Where one token makes a massive activation, they
are not: it is felt by few, and KFAC overrates what an error costs there. Here the Fisher information of each row of a
matrix is kept whole:

    KL  ~  1/2 sum over rows i of  E[ (g_i . e_i)^2 ]        g_i = gradient of log p(y) by the row, e_i = stored - w

with y sampled from the model. Targets at different places are drawn independently, so a whole text may be projected at once:
the cross terms have expectation 0 (texts are the samples; of one row, a few dozen squares). Rows are taken as independent, as
in KFAC: errors of different rows have signs of their own. Only sampled rows are projected, those whose errors
:mod:`slmops.build.steps.predicted` kept.

For the output matrix the expectation over y is taken exactly, token by token: p_v (1 - p_v) (e_v . h)^2.

Source: Martens 2020, New insights and perspectives on the natural gradient method, arXiv:1412.1193 (the Fisher information and
the divergence); Frantar et al. 2021, M-FAC, arXiv:2107.03356 (gradients projected instead of a matrix kept).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from slmops.train.fisher import Outputs, Pass, output_name, passes
from slmops.train.llama import Llama

if TYPE_CHECKING:
    from numpy.typing import NDArray

EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class RowErrors:
    """Errors of some rows of one matrix.

    Attributes:
        kinds: of errors: types.
        rows: which rows, (r,).
        weights: how many rows each stands for, (r,).
        errors: (kinds, r, columns), in units of ``unit``; float16 will do.
        unit: see above.
    """

    kinds: tuple[str, ...]
    rows: NDArray[np.int64]
    weights: NDArray[np.float64]
    errors: NDArray[np.float16] | NDArray[np.float32]
    unit: float = 1.0


def projected(
    llama: Llama,
    sequences: Sequence[Sequence[int]],
    errors: Mapping[str, RowErrors],
    *,
    seed: int,
    progress: Callable[[float], None] = lambda ratio: None,
) -> dict[str, dict[str, float]]:
    """Predict the divergence that each kind of error causes in each tensor, nats a token.

    Args:
        llama: float32 weights.
        sequences: token ids; each is a text of its own.
        errors: tensor name to errors of its rows; tensors that are no layer of this model count nothing.
        seed: of the sampled targets.
        progress: told the share done.
    """
    hook = Outputs(llama, keep_inputs=True)
    output = output_name(llama)
    squares = {
        name: torch.zeros(len(one.rows), len(one.kinds), dtype=torch.float64) for name, one in errors.items()
    }
    tokens = 0
    for one in passes(llama, sequences, seed, hook):
        text = (one.positions == 0).cumsum(0) - 1  # (t,): which text of the row a token belongs to
        for name, gradient in hook.gradients().items():
            rows = errors.get(name + ".weight")
            if rows is not None:
                felt = gradient[:, torch.from_numpy(rows.rows)]
                projections = _by_row(rows) @ _row_gradients(felt, hook.inputs[name], text)
                squares[name + ".weight"] += projections.double().square().sum(-1)
        if output in errors:
            squares[output] += _of_output(errors[output], one)
        if EMBEDDING in errors:
            squares[EMBEDDING] += _of_lookups(errors[EMBEDDING], one, text, llama.shape.vocabulary_tokens)
        tokens += len(one.ids)
        progress(one.ratio)
    found = {}
    for name, rows in errors.items():
        total = 0.5 * (torch.from_numpy(rows.weights)[:, None] * squares[name]).sum(0) / tokens
        found[name] = dict(zip(rows.kinds, total.tolist(), strict=True))
    return found


def _by_row(rows: RowErrors) -> torch.Tensor:
    """Errors as (r, kinds, columns) float32."""
    return torch.from_numpy(rows.errors).transpose(0, 1).float() * rows.unit


def _row_gradients(felt: torch.Tensor, inputs: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Each text's gradient by each row: felt (t, r), inputs (t, columns), text (t,); returns (r, columns, texts)."""
    lengths = torch.bincount(text).tolist()
    pieces = zip(felt.split(lengths), inputs.split(lengths), strict=True)
    return torch.stack([f.T @ x for f, x in pieces], dim=-1)


def _of_output(rows: RowErrors, one: Pass) -> torch.Tensor:
    """Squares of the output matrix, its target's expectation taken exactly: (r, kinds)."""
    chances = one.chances[:, torch.from_numpy(rows.rows)]  # (t, r)
    spread = (chances * (1 - chances)).T[:, None, :].double()
    moved: torch.Tensor = _by_row(rows) @ one.hidden.T  # (r, kinds, t)
    return (moved.double().square() * spread).sum(-1)


def _of_lookups(rows: RowErrors, one: Pass, text: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Squares of the embedding as input: only rows whose token comes are felt; (r, kinds)."""
    place = torch.full((vocabulary,), -1)
    place[torch.from_numpy(rows.rows)] = torch.arange(len(rows.rows))
    here = place[one.ids]
    seen, at = torch.unique(here[here >= 0], return_inverse=True)
    squares = torch.zeros(len(rows.rows), len(rows.kinds), dtype=torch.float64)
    if len(seen):
        gradients = torch.zeros(len(seen), int(text[-1]) + 1, one.embedded.shape[1])
        gradients.index_put_((at, text[here >= 0]), one.embedded[here >= 0], accumulate=True)
        moved: torch.Tensor = _by_row(rows)[seen] @ gradients.transpose(1, 2)  # (seen, kinds, texts)
        squares[seen] = moved.double().square().sum(-1)
    return squares
