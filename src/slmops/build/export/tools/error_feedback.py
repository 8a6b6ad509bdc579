"""Linear layers in symmetric int4 by groups, each error made up for by the weights after it (GPTQ). In torch, in the toolchain.

ExecuTorch's own rounding (each weight for itself, torchao) costs SmolLM2-135M 0.75 nats a token, because XNNPACK's groups
have no zero point; with feedback it is 0.2 to 0.3 on the same text, for a minute of CPU. Scales are rounded to bfloat16 first,
as XNNPACK will do to them.

Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323, with its column order; shrinking of H as in slmops.build.feedback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

LEAST, MOST = -8, 7
#: where scales are found again from the values: what is rounded keeps a largest magnitude of this in each group
PINNED = 7
#: a group's largest magnitude, divided by these, are the scales that are tried
_DIVISORS = (7.0, 7.5, 8.0, 8.5, 9.0, 10.0)
_DAMPING = 0.01
_COLUMNS = 96
#: linear layers of a block that see the same input
_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def quantise(
    model: Any,
    sequences: Sequence[Sequence[int]],
    group_size: int,
    tell: Callable[[float | None, str], None],
    *,
    pinned: bool = False,
) -> dict[str, tuple[Any, Any]]:
    """Every linear layer of a Llama's blocks, in the order in which they are run, on what the quantised ones before give.

    Args:
        model: of transformers, float32; its blocks are changed.
        sequences: token ids of calibration text.
        group_size: weights that share a scale.
        tell: progress.
        pinned: see :func:`rounded`.

    Returns:
        By Hugging Face's name: int8 values within -8..7 (out, in), and float32 scales (out, in / group_size).
    """
    import torch

    made: dict[str, tuple[Any, Any]] = {}
    tokens = sum(map(len, sequences))
    with torch.no_grad():
        states, arguments = _first_inputs(model, sequences)
        layers = model.model.layers
        for number, layer in enumerate(layers):
            hessians = _hessians(layer, states, arguments)
            for names in _INPUTS:
                shrunk = _shrunk(hessians[names[0]], tokens)
                for name in names:
                    linear = layer.get_submodule(name)
                    values, scales = rounded(linear.weight.data, shrunk, group_size, pinned=pinned)
                    linear.weight.data = values * scales.repeat_interleave(group_size, dim=1)
                    made[f"model.layers.{number}.{name}.weight"] = (values.to(torch.int8), scales)
            states = [_state(layer(state, **told)) for state, told in zip(states, arguments, strict=True)]
            tell((number + 1) / len(layers), "rounding weights with error feedback")
    return made


def rounded(weight: Any, hessian: Any, group_size: int, *, pinned: bool = False) -> tuple[Any, Any]:
    """One matrix (out, in): its values as floats, and scales (out, in / group_size).

    With ``pinned`` a scale is the group's largest magnitude over 7 and that weight stays at 7 or -7: an exporter that takes
    scales from largest magnitudes finds the very same ones, and rounds nothing again.
    """
    import torch

    columns = weight.shape[1]
    places = torch.arange(columns)
    hessian = hessian.clone()
    hessian[places, places] += _DAMPING * hessian.diagonal().mean().clamp_min(1e-12)
    grouped = weight.reshape(weight.shape[0], -1, group_size)
    scales = _scales(grouped, hessian.diagonal(), (float(PINNED),) if pinned else _DIVISORS)
    least = -PINNED if pinned else LEAST
    largest = grouped.abs().argmax(-1) + torch.arange(0, columns, group_size)
    order = torch.argsort(hessian.diagonal(), descending=True)
    left, group = weight[:, order].clone(), order // group_size
    lower = torch.linalg.cholesky(hessian[order][:, order])
    carry = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    values = torch.zeros_like(left)
    for begin in range(0, columns, _COLUMNS):
        end = min(begin + _COLUMNS, columns)
        errors = torch.zeros(weight.shape[0], end - begin)
        for at in range(begin, end):
            scale = scales[:, group[at]]
            values[:, at] = torch.clamp(torch.round(left[:, at] / scale), least, MOST)
            if pinned:
                stays = largest[:, group[at]] == order[at]
                values[stays, at] = PINNED * torch.sign(weight[stays, order[at]])
            error = (left[:, at] - values[:, at] * scale) / carry[at, at]
            left[:, at:end] -= error[:, None] * carry[at, at:end][None]
            errors[:, at - begin] = error
        left[:, end:] -= errors @ carry[begin:end, end:]
    result = torch.empty_like(values)
    result[:, order] = values
    return result, scales


def rows_in_int8(weight: Any) -> tuple[Any, Any]:
    """A matrix by rows: int8 values, and a float32 scale for each row."""
    import torch

    scales = weight.abs().amax(dim=1).clamp_min(1e-9) / 127
    return torch.round(weight / scales[:, None]).to(torch.int8), scales


def _scales(grouped: Any, importance: Any, divisors: Sequence[float]) -> Any:
    """Of each group (out, groups, group) the scale with the least squared error, inputs' squares as weights."""
    import torch

    weights = importance.reshape(1, grouped.shape[1], grouped.shape[2])
    largest = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-9)
    best, least = None, None
    for divisor in divisors:
        scale = (largest / divisor).bfloat16().float()
        values = torch.clamp(torch.round(grouped / scale), LEAST, MOST)
        error = ((values * scale - grouped).square() * weights).sum(-1, keepdim=True)
        if best is None or least is None:
            best, least = scale, error
        else:
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    assert best is not None
    return best[..., 0]


def _shrunk(hessian: Any, tokens: int) -> Any:
    """Drawn towards its diagonal as far as few tokens leave it noise."""
    import torch

    columns = hessian.shape[0]
    share = columns / (columns + 2 * tokens)
    return (1 - share) * hessian + share * torch.diag(hessian.diagonal())


def _hessians(layer: Any, states: Sequence[Any], arguments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}
    hooks = []
    for first, *_ in _INPUTS:
        linear = layer.get_submodule(first)
        found[first] = torch.zeros(linear.in_features, linear.in_features)

        def add(_: Any, given: tuple[Any, ...], first: str = first) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1])
            found[first] += rows.T @ rows

        hooks.append(linear.register_forward_pre_hook(add))
    for state, told in zip(states, arguments, strict=True):
        layer(state, **told)
    for hook in hooks:
        hook.remove()
    return found


class _Enough(Exception):
    """The first block was reached."""


def _first_inputs(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[list[Any], list[dict[str, Any]]]:
    """What the first block is given for each sequence."""
    import torch

    states: list[Any] = []
    arguments: list[dict[str, Any]] = []

    def grab(_: Any, given: tuple[Any, ...], told: dict[str, Any]) -> None:
        told = dict(told)
        states.append(given[0] if given else told.pop("hidden_states"))
        arguments.append(told)
        raise _Enough

    hook = model.model.layers[0].register_forward_pre_hook(grab, with_kwargs=True)
    for sequence in sequences:
        try:
            model(torch.tensor([list(sequence)]), use_cache=False)
        except _Enough:
            continue
    hook.remove()
    return states, arguments


def _state(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
