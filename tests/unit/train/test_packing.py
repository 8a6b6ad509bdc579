"""Packed rows: sharing the common start and leaving out padding changes no loss."""

# ruff: noqa: E402 - what needs torch is imported after the question whether it is there
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F

from slmops.train.llama import LINEARS, Llama, LlamaShape, causal_mask
from slmops.train.lora import LoraWeights
from slmops.train.packing import Example, batches, pack, shared_start_tokens

SHAPE = LlamaShape(
    layers=2,
    hidden=32,
    ffn=64,
    heads=4,
    kv_heads=2,
    vocabulary_tokens=50,
    context_tokens=128,
    rope_base=10000.0,
    norm_epsilon=1e-5,
)
EXAMPLES = [
    Example((1, 2, 3, 4, 5, 6), (7, 8, 9)),
    Example((1, 2, 3, 10, 6), (11, 9)),
    Example((1, 2, 3, 4, 12, 13, 6), (14, 15, 16, 9)),
]


def random_llama() -> Llama:
    """A small Llama with seeded weights."""
    chance = torch.Generator().manual_seed(5)
    weights = {
        "token_embd.weight": torch.randn(SHAPE.vocabulary_tokens, SHAPE.hidden, generator=chance),
        "output_norm.weight": torch.ones(SHAPE.hidden),
    }
    for layer in range(SHAPE.layers):
        for norm in ("attn_norm", "ffn_norm"):
            weights[f"blk.{layer}.{norm}.weight"] = torch.ones(SHAPE.hidden)
        for linear in LINEARS:
            size = SHAPE.linear_shape(linear)
            weights[f"blk.{layer}.{linear}.weight"] = torch.randn(size, generator=chance) / size[1] ** 0.5
    return Llama(SHAPE, weights)


def test_row_equals_one_pass_for_each_example() -> None:
    """Loss and gradients of a packed row are those of the examples one by one."""
    llama = random_llama()
    packed, single = (LoraWeights(SHAPE, 2, 4.0, seed=3) for _ in range(2))
    row = pack(EXAMPLES)
    hidden = llama.hidden(row.tokens, row.positions, row.mask, packed)
    whole = F.cross_entropy(llama.logits(hidden[row.predicts]), row.targets, reduction="sum")
    whole.backward()

    total = torch.zeros(())
    for example in EXAMPLES:
        tokens = torch.tensor(example.prompt + example.answer)
        hidden = llama.hidden(tokens, torch.arange(len(tokens)), causal_mask(len(tokens)), single)
        logits = llama.logits(hidden[len(example.prompt) - 1 : -1])
        total = total + F.cross_entropy(logits, torch.tensor(example.answer), reduction="sum")
    total.backward()

    torch.testing.assert_close(whole, total, rtol=1e-5, atol=1e-5)
    for name, leaf in packed.b.items():
        torch.testing.assert_close(leaf.grad, single.b[name].grad, rtol=1e-4, atol=1e-5)


def test_shared_start_leaves_each_prompt_its_last_token() -> None:
    """The start is common to all, and never a whole prompt: its last token predicts the answer."""
    assert shared_start_tokens([example.prompt for example in EXAMPLES]) == 3
    assert shared_start_tokens([(1, 2, 3), (1, 2, 3)]) == 2
    assert shared_start_tokens([(1, 2), (3, 4)]) == 0


def test_every_epoch_holds_each_example_once() -> None:
    """Batches are a seeded permutation of the examples, epoch by epoch."""
    examples = [Example((1, index), (2,)) for index in range(10, 40)]
    first = [batch for epoch, batch in _take(batches(examples, 12, seed=1), 40)]
    again = [batch for epoch, batch in _take(batches(examples, 12, seed=1), 40)]
    assert first == again
    flat = [example.prompt[1] for batch in first for example in batch]
    assert sorted(flat[:30]) == list(range(10, 40))
    assert sorted(flat[30:60]) == list(range(10, 40))
    assert flat[:30] != flat[30:60]


def _take(source, count):  # type: ignore[no-untyped-def]
    return [next(source) for _ in range(count)]
