"""Low-rank adapters: the only weights that are trained.

Owns: the pairs (A, B) of every linear layer and how they act. For a layer with weight ``W`` (out, in):

    y = x Wᵀ + (alpha / rank) · (x Aᵀ) Bᵀ        A: (rank, in)   B: (out, rank)

B starts at zero, so an untrained adapter changes nothing; A starts uniform (Kaiming), seeded.
Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from slmops.train.llama import LINEARS, LlamaShape


class LoraWeights:
    """A and B for each linear layer of a Llama.

    Args:
        shape: of the base.
        rank: inner width, > 0.
        alpha: the addition is scaled by alpha / rank.
        seed: of A's initial values.
    """

    def __init__(self, shape: LlamaShape, rank: int, alpha: float, seed: int) -> None:
        """Make float32 leaves that require gradients."""
        self.rank = rank
        self.alpha = alpha
        chance = torch.Generator().manual_seed(seed)
        self.a: dict[str, torch.Tensor] = {}
        self.b: dict[str, torch.Tensor] = {}
        for layer in range(shape.layers):
            for linear in LINEARS:
                wide, deep = shape.linear_shape(linear)
                bound = 1.0 / math.sqrt(deep)
                a = torch.rand(rank, deep, generator=chance) * (2 * bound) - bound
                self.a[f"blk.{layer}.{linear}"] = a.requires_grad_()
                self.b[f"blk.{layer}.{linear}"] = torch.zeros(wide, rank, requires_grad=True)

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank

    def parameters(self) -> list[torch.Tensor]:
        """Every trained tensor, in a fixed order."""
        return [*self.a.values(), *self.b.values()]

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """Return the adapter's addition to layer ``name`` for ``x`` (tokens, in_features)."""
        if name not in self.a:
            return None
        a, b = self.a[name].to(x.dtype), self.b[name].to(x.dtype)
        return F.linear(F.linear(x, a), b * self.scale)
