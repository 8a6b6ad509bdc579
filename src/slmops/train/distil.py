"""Distillation: a student learns a teacher's next-token distributions.

The loss is the forward KL divergence over the teacher's likeliest tokens and one bucket for all the others,

    sum_i p_i (log p_i - log q_i)  +  p_rest (log p_rest - log q_rest),

a lower bound of the divergence over the whole vocabulary, and zero only where student and teacher agree on every kept token
and on how much is left for the rest. Without the bucket a student would learn that the rest never comes.

Teacher's distributions are computed once, by the engine (``slmops.build.steps.teacher``), so training runs one model, not two.
What is kept at the end is the best of a few looks at rows that were not learned from, the start included: distillation on too
little text cannot make a model worse there.

Source: Hinton et al. 2015, arXiv:1503.02531; arXiv:2503.16870 (why top-k alone is biased).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slmops.train.llama import Llama
from slmops.train.lora import LoraWeights
from slmops.train.students import (
    TextRow,
    begin,
    load_state,
    order_of,
    rate_at,
    save_state,
    text_rows,
)

ROW_TOKENS = 256
CHECKPOINT_EVERY_S = 240.0
#: rows of a step, so that a step follows the text and not one row; fewer of little text, so that there are steps enough
BATCH_ROWS, LEAST_STEPS = 4, 16
#: how often the watched rows are looked at, beside the start
LOOKS = 4
_TINY = 1e-12


@dataclass(frozen=True)
class Distillation:
    """What decides the result, besides student, teacher and text.

    Attributes:
        method: ``full``: every weight; ``lora``: low-rank additions to the linear layers, merged at the end.
        rank: of ``lora``.
        epochs: how often the text is gone through.
        learning_rate: peak; ``lora`` takes ten times as much. (SmolLM2 at width 1280, 16,249 tokens that the cut was not
            fitted to, held-out divergence .1039: ``lora`` at 1e-4 .1010, at 3e-5 .1027; ``full`` at 3e-5 .1021. On text
            that it was fitted to, where it already looks twice as good as elsewhere, nothing: .1113.)
        seed: of the order of rows and of the additions.
        keep_zeros: weights that are zero in the blocks' matrices stay zero (after sparsify).
    """

    method: str = "full"
    rank: int = 16
    epochs: int = 1
    learning_rate: float = 3e-5
    seed: int = 7
    keep_zeros: bool = False


@dataclass(frozen=True)
class Teacher:
    """Kept distributions, in the text's order: ids (tokens, k), log-probabilities (tokens, k)."""

    ids: npt.NDArray[np.uint32]
    logprobs: npt.NDArray[np.float16]

    def at(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (n, k) int64 and log-probabilities (n, k) float32 of some tokens."""
        index = places.numpy()
        return (
            torch.from_numpy(self.ids[index].astype(np.int64)),
            torch.from_numpy(self.logprobs[index].astype(np.float32)),
        )


def bucket_divergence(logits: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL divergence of each row from the teacher, over kept tokens and the rest, nats.

    Args:
        logits: the student's, (n, vocabulary).
        ids: kept tokens, (n, k) int64.
        teacher: their log-probabilities, (n, k).

    Returns: (n,).
    """
    whole = logits.logsumexp(-1, keepdim=True)
    ours = logits.gather(-1, ids) - whole  # (n, k)
    p = teacher.exp()
    divergence = (p * (teacher - ours)).sum(-1)
    if ids.shape[-1] == logits.shape[-1]:
        return divergence
    others = logits.scatter(-1, ids, float("-inf")).logsumexp(-1) - whole.squeeze(
        -1
    )  # (n,): log of the student's rest
    rest = (1 - p.sum(-1)).clamp(_TINY, 1.0)
    return divergence + rest * (rest.log() - others)


class _Student:
    """The model, and which of its numbers learn."""

    def __init__(self, llama: Llama, settings: Distillation) -> None:
        self.llama = llama
        self.lora = (
            LoraWeights(llama.shape, settings.rank, 2.0 * settings.rank, settings.seed)
            if settings.method == "lora"
            else None
        )
        self.kept: dict[str, torch.Tensor] = {}
        if self.lora is None:
            for name, weight in llama.weights.items():
                if settings.keep_zeros and name.startswith("blk.") and weight.ndim > 1:
                    self.kept[name] = weight != 0
                llama.weights[name] = weight.requires_grad_()
            llama.output = llama.weights.get("output.weight", llama.weights["token_embd.weight"])

    def parameters(self) -> list[torch.Tensor]:
        return list(self.llama.weights.values()) if self.lora is None else self.lora.parameters()

    def divergence(self, row: TextRow, teacher: Teacher) -> torch.Tensor:
        """Sum over the row's tokens."""
        hidden = self.llama.hidden(row.tokens, row.positions, row.mask, self.lora)
        return bucket_divergence(self.llama.logits(hidden), *teacher.at(row.places)).sum()

    def after_step(self) -> None:
        with torch.no_grad():
            for name, kept in self.kept.items():
                self.llama.weights[name].mul_(kept)

    def finished(self) -> dict[str, torch.Tensor]:
        """All weights, with what was learned inside."""
        weights = {name: weight.detach() for name, weight in self.llama.weights.items()}
        if self.lora is not None:
            for name, a in self.lora.a.items():
                b = self.lora.b[name].detach()
                weights[name + ".weight"] = weights[name + ".weight"] + self.lora.scale * (b @ a.detach())
        return weights


def distil(  # noqa: PLR0913 - student, teacher, text, settings, and where to report
    llama: Llama,
    teacher: Teacher,
    sequences: Sequence[Sequence[int]],
    watched: Sequence[Sequence[int]],
    settings: Distillation,
    *,
    checkpoint: Path | None = None,
    report: Callable[[float, str], None] = lambda ratio, note: None,
    stop_after: int | None = None,
) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """Train.

    Args:
        llama: the student, float32; its weights are changed.
        teacher: distributions at every token of the text, then of what is watched.
        sequences: the text, token ids; ``watched``: others, that tell whether learning helps.
        watched: see above.
        settings: see there.
        checkpoint: file to keep state in; taken up when it is there.
        report: called with the share done and a note.
        stop_after: end after so many steps as a kill would, leaving a checkpoint: for the test that a run goes on.

    Returns: all weights by tensor name; and ``divergence_before`` and ``divergence_after`` on what was watched (nats a
    token), ``steps`` made, ``best_step``, ``tokens`` learned from, and the ``verdict`` in words.
    """
    begin(settings.seed)
    rows = text_rows(sequences, ROW_TOKENS)
    others = text_rows(watched, ROW_TOKENS, first=sum(map(len, sequences)))
    student = _Student(llama, settings)
    parameters = student.parameters()
    peak = settings.learning_rate * (10 if student.lora is not None else 1)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    batch = min(BATCH_ROWS, max(len(rows) // LEAST_STEPS, 1))
    epoch_steps = -(-len(rows) // batch)
    steps = settings.epochs * epoch_steps
    looks = {max(1, round(steps * (index + 1) / LOOKS)) for index in range(LOOKS)}
    identity = {**asdict(settings), "rows": len(rows), "watched": len(others), "batch": batch}

    def look() -> float:
        with torch.no_grad():
            values = [float(student.divergence(row, teacher).item()) for row in others]
        return sum(values) / sum(len(row.tokens) for row in others)

    state = load_state(checkpoint, identity)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        _put(parameters, state["parameters"])
        step, first, best, best_step = state["step"], state["first"], state["best"], state["best_step"]
        kept = state["kept"]
    else:
        step, best_step = 0, 0
        first = best = look()
        kept = [leaf.detach().clone() for leaf in parameters]
    saved = time.monotonic()
    while step < steps:
        at = step % epoch_steps * batch
        chosen = order_of(len(rows), step // epoch_steps, settings.seed)[at : at + batch]
        tokens = sum(len(rows[index].tokens) for index in chosen)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, peak)
        loss = 0.0
        for index in chosen:  # one after another: memory of one row
            part = student.divergence(rows[index], teacher) / tokens
            torch.autograd.backward(part)
            loss += float(part.item())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        student.after_step()
        step += 1
        if step in looks:
            now = look()
            if now < best:
                best, best_step = now, step
                kept = [leaf.detach().clone() for leaf in parameters]
        report(step / steps, f"step {step} of {steps}: divergence {loss:.4f}, watched {best:.4f}")
        if stop_after == step or time.monotonic() - saved > CHECKPOINT_EVERY_S:
            progress = {"step": step, "first": first, "best": best, "best_step": best_step, "kept": kept}
            weights = [leaf.detach() for leaf in parameters]
            save_state(
                checkpoint,
                {
                    "settings": identity,
                    **progress,
                    "parameters": weights,
                    "optimizer": optimizer.state_dict(),
                },
            )
            saved = time.monotonic()
        if stop_after == step:
            break
    _put(parameters, kept)
    watched_tokens = sum(len(row.tokens) for row in others)
    if best < first:
        verdict = (
            f"{1 - best / first:.1%} closer to its teacher ({first:.4f} to {best:.4f} nats a token on {watched_tokens} tokens "
            "that it did not learn from)"
        )
    else:
        verdict = f"no closer to its teacher on {watched_tokens} tokens that it did not learn from: the model stays as it was"
    return student.finished(), {
        "verdict": verdict,
        "divergence_before": first,
        "divergence_after": best,
        "steps": step,
        "best_step": best_step,
        "tokens": sum(len(row.tokens) for row in rows),
    }


def _put(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for leaf, value in zip(parameters, values, strict=True):
            leaf.copy_(value)
