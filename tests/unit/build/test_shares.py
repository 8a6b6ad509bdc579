"""Who makes which tensors of a variant."""

from __future__ import annotations

from dataclasses import replace

from slmops.artifact.gguf_layout import Tensor
from slmops.build.steps.quantise import shares


def tensor(name: str, columns: int, rows: int) -> Tensor:
    size_bytes = 2 * columns * rows
    return Tensor(name, "F16", (columns, rows), 0, size_bytes, size_bytes)


def test_parts_are_about_equal_and_keep_tensors_of_one_input_together() -> None:
    """Every tensor once; what shares an input shares the factoring of its Hessian, so it is one process's."""
    tensors = [
        tensor(f"blk.{layer}.{kind}.weight", 64, rows)
        for layer in range(6)
        for kind, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("ffn_down", 256))
    ]

    def shared(name: str) -> str:
        return name if "ffn_down" in name else name.replace("attn_k", "attn_q").replace("attn_v", "attn_q")

    divided = shares(tensors, shared, 2)
    assert sorted(t.name for part in divided for t in part) == sorted(t.name for t in tensors)
    sizes = [sum(t.elements for t in part) for part in divided]
    assert max(sizes) <= 1.1 * min(sizes)
    inputs = [{shared(t.name) for t in part} for part in divided]
    assert not inputs[0] & inputs[1]
    assert [len(part) for part in shares(tensors[:1], shared, 2)] == [1, 0]


def test_slices_of_one_tensor_are_divided() -> None:
    """What they share is factored by each process; it is little beside many rows."""
    slices = [replace(tensor("token_embd.weight", 64, 512), offset=at) for at in range(4)]
    assert [len(part) for part in shares(slices, lambda name: name, 2)] == [2, 2]
