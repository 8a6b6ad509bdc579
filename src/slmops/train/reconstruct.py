"""Block-wise reconstruction: each block of a cut model learns to give what the dense model's blocks give.

Block after block, from the first: the student's block gets what the student's blocks before it give (so that it also mends
their errors), and its target is what the dense model has at the same place. A block whose successors were dropped takes over
their work: its target lies behind them. The loss is the squared error relative to each token's own length, because the
next block normalises each token, and a few tokens are hundreds of times longer than others.

A block keeps what it learned only if that is better on rows that it did not learn from.

Source: arXiv:2510.14444 (local reconstruction after pruning).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from slmops.train.llama import Llama
from slmops.train.students import (
    TextRow,
    begin,
    held_out,
    load_state,
    order_of,
    rate_at,
    save_state,
    text_rows,
)

ROW_TOKENS = 256
CHECKPOINT_EVERY_S = 60.0


@dataclass(frozen=True)
class Reconstruction:
    """What decides the result, besides the models and the text.

    Attributes:
        epochs: how often each block goes through the text.
        learning_rate: peak.
        seed: of the order of rows.
    """

    epochs: int = 3
    learning_rate: float = 2e-4
    seed: int = 7


def segments(kept: Sequence[int], layers: int) -> list[range]:
    """Which of the dense model's blocks each student's block stands for: itself, and the dropped ones up to the next.

    Args:
        kept: the dense model's blocks that the student has, ascending.
        layers: of the dense model.
    """
    starts = [0, *kept[1:]]
    return [range(start, end) for start, end in zip(starts, [*kept[1:], layers], strict=True)]


def reconstruct(  # noqa: PLR0913 - two models, their relation, text, settings, and where to report
    student: Llama,
    dense: Llama,
    kept: Sequence[int],
    sequences: Sequence[Sequence[int]],
    settings: Reconstruction,
    *,
    checkpoint: Path | None = None,
    report: Callable[[float, str], None] = lambda ratio, note: None,
) -> dict[str, Any]:
    """Fit the student's blocks, in place.

    Args:
        student: the cut model; ``dense``: the model before the cuts, with the same vocabulary.
        dense: see above.
        kept: see ``segments``.
        sequences: token ids.
        settings: see there.
        checkpoint: file to keep state in; taken up when it is there.
        report: called with the share done and a note.

    Returns: ``blocks``, ``improved_blocks``, and the mean relative error before and after, on rows that were not learned from.
    """
    begin(settings.seed)
    rows = text_rows(sequences, ROW_TOKENS)
    watched = held_out(len(rows))
    learned = [index for index in range(len(rows)) if index not in watched]
    parts = segments(kept, dense.shape.layers)
    identity = {**asdict(settings), "rows": len(rows), "blocks": len(parts)}
    state = load_state(checkpoint, identity)
    before: list[float] = list(state["before"]) if state else []
    after: list[float] = list(state["after"]) if state else []
    if state:
        student.weights.update(state["weights"])
    saved = time.monotonic()
    with torch.no_grad():
        ours = [student.embed(row.tokens) for row in rows]
        theirs = [dense.embed(row.tokens) for row in rows]
    for block, part in enumerate(parts):
        with torch.no_grad():
            for layer in part:
                theirs = [_run(dense, layer, x, row) for x, row in zip(theirs, rows, strict=True)]
        if block >= len(after):
            errors = _fit(student, block, rows, ours, theirs, (learned, watched or learned), settings)
            before.append(errors[0])
            after.append(errors[1])
        with torch.no_grad():
            ours = [_run(student, block, x, row) for x, row in zip(ours, rows, strict=True)]
        report(
            (block + 1) / len(parts),
            f"block {block}: relative error {before[block]:.4f} to {after[block]:.4f}",
        )
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            weights = {n: w for n, w in student.weights.items() if n.startswith("blk.")}
            save_state(
                checkpoint, {"settings": identity, "before": before, "after": after, "weights": weights}
            )
            saved = time.monotonic()
    return {
        "blocks": len(parts),
        "improved_blocks": sum(new < old for old, new in zip(before, after, strict=True)),
        "error_before": sum(before) / len(before),
        "error_after": sum(after) / len(after),
        "tokens": sum(len(row.tokens) for row in rows),
    }


def _run(model: Llama, layer: int, x: torch.Tensor, row: TextRow) -> torch.Tensor:
    return model.block(layer, x, *model.turning(row.positions), model.bias(row.mask))


def _fit(  # noqa: PLR0913 - one block's share of the above
    student: Llama,
    block: int,
    rows: Sequence[TextRow],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    chosen: tuple[Sequence[int], Sequence[int]],
    settings: Reconstruction,
) -> tuple[float, float]:
    """Train one block on some rows, watch others; return the watched rows' error before and after."""
    learned, watched = chosen
    prefix = f"blk.{block}."
    old = {name: weight for name, weight in student.weights.items() if name.startswith(prefix)}

    def error(index: int) -> torch.Tensor:
        difference = _run(student, block, inputs[index], rows[index]) - targets[index]  # (t, hidden)
        return (difference.square().sum(-1) / targets[index].square().sum(-1)).mean()

    def watched_error() -> float:
        with torch.no_grad():
            return float(sum(error(index).item() for index in watched)) / len(watched)

    first = watched_error()
    leaves = {name: weight.clone().requires_grad_() for name, weight in old.items()}
    student.weights.update(leaves)
    optimizer = torch.optim.AdamW(
        leaves.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    steps = settings.epochs * len(learned)
    for step in range(steps):
        index = order_of(learned, step // len(learned), settings.seed)[step % len(learned)]
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, settings.learning_rate)
        torch.autograd.backward(error(index))
        torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    student.weights.update({name: leaf.detach() for name, leaf in leaves.items()})
    last = watched_error()
    if last < first:
        return first, last
    student.weights.update(old)
    return first, first


def trained(student: Llama) -> Mapping[str, torch.Tensor]:
    """The weights that reconstruction may have changed."""
    return {name: weight for name, weight in student.weights.items() if name.startswith("blk.")}
