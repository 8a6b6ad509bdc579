"""How much the output distribution feels each output of each layer: second moments of gradients. Needs torch.

The KL divergence that a small error D in a layer's weights causes is, to second order, half of D' F D with F the Fisher
information. Kronecker-factored (KFAC), rows taken as independent:

    KL  ~  1/2 sum over rows i of  E[g_i^2]  D_i H D_i'          H = E[x x'] of the layer's inputs

where g is the gradient of log p(y) with respect to the layer's output and **y is sampled from the model**, not read from
the text: only then is it the Fisher information, and positions do not mix. H comes from the engine; this module gives
E[g_i^2], by one forward and one backward pass.

For the output matrix the expectation over y is taken exactly: E[g_v^2] = p_v (1 - p_v). A tied embedding is also the
input of the first layer; what an error costs there is E[g_d^2] of that input, by how often a token comes.

Source: Martens and Grosse 2015, arXiv:1503.05671, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from slmops.train.llama import Llama

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: tokens of one pass; short sequences are packed side by side
ROW_TOKENS = 384


@dataclass(frozen=True)
class Moments:
    """Means over tokens.

    Attributes:
        rows: tensor name to E[g_i^2], shape (out_features,).
        embedding_input: E[g_d^2] of what the embedding gives, shape (hidden,).
        token_share: how often each token comes as an input, shape (vocabulary,), sum 1.
        tokens: that were seen.
    """

    rows: dict[str, NDArray[np.float64]]
    embedding_input: NDArray[np.float64]
    token_share: NDArray[np.float64]
    tokens: int


class Outputs:
    """The hook: adds a zero to every layer's output, whose gradient is the gradient of that output.

    Args:
        llama: whose layers are watched.
        keep_inputs: also keep what each layer was given.
    """

    def __init__(self, llama: Llama, *, keep_inputs: bool = False) -> None:
        self.leaves: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}
        self._keep_inputs = keep_inputs
        self._widths = {
            name.removesuffix(".weight"): weight.shape[0]
            for name, weight in llama.weights.items()
            if weight.ndim == 2
        }

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """A leaf of zeros; its width is learned from the layer's weight."""
        leaf = torch.zeros(len(x), self._widths[name], requires_grad=True)
        self.leaves[name] = leaf
        if self._keep_inputs:
            self.inputs[name] = x.detach()
        return leaf

    def gradients(self) -> dict[str, torch.Tensor]:
        """By layer the gradient of its output, (tokens, out_features)."""
        found = {name: leaf.grad for name, leaf in self.leaves.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}


@dataclass(frozen=True)
class Pass:
    """One packed row, gone through forward and backward.

    Attributes:
        ids, positions: of its tokens, (t,).
        hidden: after the last norm, (t, hidden).
        chances: of every next token, (t, vocabulary).
        embedded: gradient of what the embedding gave, (t, hidden).
        ratio: share of the rows done with this one.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor
    chances: torch.Tensor
    embedded: torch.Tensor
    ratio: float


def passes(llama: Llama, sequences: Sequence[Sequence[int]], seed: int, hook: Outputs) -> Iterator[Pass]:
    """Run a text forward and backward once, with targets sampled from the model; the hook has the layers' gradients.

    Args:
        llama: float32 weights.
        sequences: token ids; each is a text of its own.
        seed: of the sampled targets.
        hook: watches the layers; emptied before each row.
    """
    chance = torch.Generator().manual_seed(seed)
    embedding = llama.weights["token_embd.weight"]
    rows = packed(sequences)
    try:
        for index, (ids, positions, mask) in enumerate(rows):
            hook.leaves.clear()
            hook.inputs.clear()
            own = embedding[ids].detach().clone().requires_grad_()  # (t, hidden): each place its own row
            llama.weights["token_embd.weight"] = own
            hidden = llama.hidden(torch.arange(len(ids)), positions, mask, hook)
            likelihood = torch.log_softmax(llama.logits(hidden), dim=-1)
            chances = likelihood.detach().exp()
            targets = torch.multinomial(chances, 1, generator=chance)
            torch.autograd.backward(likelihood.gather(1, targets).sum())
            assert own.grad is not None
            yield Pass(ids, positions, hidden.detach(), chances, own.grad, (index + 1) / len(rows))
    finally:
        llama.weights["token_embd.weight"] = embedding


def moments(
    llama: Llama,
    sequences: Sequence[Sequence[int]],
    *,
    seed: int,
    progress: Callable[[float], None] = lambda ratio: None,
) -> Moments:
    """Second moments over a text.

    Args:
        llama: float32 weights.
        sequences: token ids; each is a text of its own.
        seed: of the sampled targets.
        progress: told the share done.
    """
    hook = Outputs(llama)
    sums: dict[str, torch.Tensor] = {}
    by_input = torch.zeros(llama.shape.hidden, dtype=torch.float64)
    by_output = torch.zeros(llama.shape.vocabulary_tokens, dtype=torch.float64)
    counts = torch.zeros(llama.shape.vocabulary_tokens, dtype=torch.float64)
    tokens = 0
    for one in passes(llama, sequences, seed, hook):
        by_output += (one.chances * (1 - one.chances)).sum(0, dtype=torch.float64)
        counts += torch.bincount(one.ids, minlength=len(counts))
        by_input += one.embedded.square().sum(0, dtype=torch.float64)
        for name, gradient in hook.gradients().items():
            squares = gradient.square().sum(0, dtype=torch.float64)
            key = name + ".weight"
            sums[key] = sums[key] + squares if key in sums else squares
        tokens += len(one.ids)
        progress(one.ratio)
    sums[output_name(llama)] = by_output
    return Moments(
        {name: (total / tokens).numpy() for name, total in sums.items()},
        (by_input / tokens).numpy(),
        (counts / tokens).numpy(),
        tokens,
    )


def output_name(llama: Llama) -> str:
    """The tensor that gives the logits."""
    return "output.weight" if "output.weight" in llama.weights else "token_embd.weight"


def packed(sequences: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Sequences side by side in rows of about ``ROW_TOKENS``: ids, positions, and who may look at whom."""
    rows: list[list[Sequence[int]]] = [[]]
    for sequence in sequences:
        for at in range(0, len(sequence), ROW_TOKENS):
            piece = sequence[at : at + ROW_TOKENS]
            if rows[-1] and sum(map(len, rows[-1])) + len(piece) > ROW_TOKENS:
                rows.append([])
            rows[-1].append(piece)
    result = []
    for row in rows:
        if not row:
            continue
        of = torch.cat([torch.full((len(piece),), index) for index, piece in enumerate(row)])
        positions = torch.cat([torch.arange(len(piece)) for piece in row])
        ids = torch.tensor([token for piece in row for token in piece])
        result.append((ids, positions, (of[:, None] == of[None, :]).tril()))
    return result
