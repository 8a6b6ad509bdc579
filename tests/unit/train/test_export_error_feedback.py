"""int4 with error feedback, as the ExecuTorch exporter rounds: what its output loses, and what its values may be."""

from __future__ import annotations

import sys

import pytest

from slmops.build.export.tool_process import TOOLS

torch = pytest.importorskip("torch")
GROUP = 32


@pytest.fixture
def feedback(monkeypatch: pytest.MonkeyPatch):
    """The script's module, as a toolchain's interpreter finds it."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import error_feedback

    yield error_feedback
    sys.modules.pop("error_feedback", None)


def test_errors_are_made_up_for_by_correlated_weights(feedback) -> None:
    """On inputs that hang together, the output loses less than by rounding each weight for itself; on unseen ones, too."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(16, 64, generator=generator)
    seen, unseen = (
        torch.randn(512, 16, generator=generator) @ mixed + 0.1 * torch.randn(512, 64, generator=generator)
        for _ in range(2)
    )
    weight = torch.randn(48, 64, generator=generator)
    values, scales = feedback.rounded(weight, seen.T @ seen, GROUP)
    alone, alone_scales = feedback.rounded(weight, torch.eye(64), GROUP)

    def lost(made, by) -> float:
        return float(((made * by.repeat_interleave(GROUP, dim=1) - weight) @ unseen.T).square().mean())

    assert lost(values, scales) < 0.5 * lost(alone, alone_scales)


def test_values_are_int4_and_scales_are_bfloat16(feedback) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    values, scales = feedback.rounded(weight, torch.eye(64), GROUP)
    assert set(values.unique().tolist()) <= set(range(-8, 8))
    assert scales.shape == (8, 2)
    assert torch.equal(scales, scales.bfloat16().float())
    assert float((values * scales.repeat_interleave(GROUP, dim=1) - weight).abs().max()) <= float(
        scales.max()
    )


def test_pinned_groups_give_their_scales_back(feedback) -> None:
    """From the rounded weights alone, largest magnitude over 7: the same scales and values, with a correlated H, too."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(16, 96, generator=generator)
    inputs = torch.randn(200, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    values, scales = feedback.rounded(weight, inputs.T @ inputs, GROUP, pinned=True)
    again = (values * scales.repeat_interleave(GROUP, dim=1)).reshape(16, -1, GROUP)
    found = again.abs().amax(-1) / 7
    assert torch.allclose(found, scales, rtol=1e-6)
    assert torch.equal(torch.round(again / found[..., None]).reshape(16, 96), values)


def test_rows_in_int8_are_within_half_a_step(feedback) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    values, scales = feedback.rows_in_int8(weight)
    assert values.dtype == torch.int8
    assert float(((values * scales[:, None] - weight) / scales[:, None]).abs().max()) <= 0.501
