"""From measured tables to the options of the knapsack: what storing a tensor in a type is expected to cost.

Two tables: the **relative error** of each tensor in each type (weighted by the importance matrix), and for
each group of tensors the **damage**: the KL divergence that was really measured when that group alone was
stored in one probe type. A divergence grows with the square of a small change and adds up over independent
changes, so

    loss(tensor, type) = damage(group) * error(tensor, type) / sum of error(t, probe type) over the group
                       + divergence of undoing the change * the tensor's share of the change * share that the
                       type swallows

The second line keeps a type from rounding a merged fine-tune away (``build/steps/sensitivity.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from slmops.core.search.knapsack import Option

#: types whose kernels are rearranged for the CPU at load (llama.cpp "repack"): preferred when otherwise equal
FAST_TYPES = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "Q8_0"})
#: how much more a slow type's loss counts: decides ties, hardly anything else
SLOW_FACTOR = 1.002
#: damage is measured on little text: a group never counts for less than this share of the mean damage per tensor
LEAST_SHARE = 0.02
#: A change that many tensors swallow a little is lost faster than the sum of squares says: on SmolLM2 with a small adapter,
#: at equal bytes, a factor of 1 gave 1.3 to 1.6 times the KL divergence of 30, which equals leaving such types out.
SWALLOW_STEEPNESS = 50.0
#: bounds of what a measurement may correct a prediction by
LEAST_CORRECTION, MOST_CORRECTION = 0.06, 4.0


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one kind at similar depth, stored in the probe type together.

    Attributes:
        tensors: their names.
        damage: measured KL divergence, nats a token.
    """

    tensors: tuple[str, ...]
    damage: float


def scales(
    groups: Collection[Group], errors: Mapping[str, Mapping[str, float]], probe_type: str
) -> dict[str, float]:
    """For each tensor: expected divergence for each unit of relative error.

    Args:
        groups: together every tensor once.
        errors: tensor to type to relative error.
        probe_type: the type that the damage was measured with.
    """
    tensors = sum(len(group.tensors) for group in groups)
    least = LEAST_SHARE * sum(group.damage for group in groups) / max(tensors, 1)
    result: dict[str, float] = {}
    for group in groups:
        error = sum(errors[name][probe_type] for name in group.tensors)
        damage = max(group.damage, least * len(group.tensors))
        for name in group.tensors:
            result[name] = damage / error if error > 0 else 0.0
    return result


def corrections(
    groups: Collection[Group], predicted: Mapping[str, float], strength: float
) -> dict[str, float]:
    """For each tensor: by how much predictions of its group are off, as measured with the probe type.

    Predictions from gradients rank well and are off by a factor where activations are massive. A group's measured damage
    corrects it, but only part of the way, because it is measured on little text, and within bounds.

    Args:
        groups: measured, together every tensor once.
        predicted: tensor to predicted damage in the probe type.
        strength: 0 leaves predictions alone, 1 corrects them fully; between, as the power of the ratio.
    """
    result: dict[str, float] = {}
    for group in groups:
        expected = sum(predicted[name] for name in group.tensors)
        ratio = group.damage / expected if expected > 0 else 1.0
        factor = min(max(ratio, LEAST_CORRECTION), MOST_CORRECTION) ** strength
        result |= dict.fromkeys(group.tensors, factor)
    return result


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; equal values share their mean rank. None for fewer than three pairs or a constant side."""
    if len(first) != len(second) or len(first) < 3:
        return None
    a, b = _ranks(first), _ranks(second)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    return covariance / spread**0.5 if spread > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end < len(order) and values[order[end]] == values[order[at]]:
            end += 1
        for index in order[at:end]:
            ranks[index] = (at + end - 1) / 2
        at = end
    return ranks


def swallow_prices(changes: Mapping[str, float], undone: float) -> dict[str, float]:
    """For each tensor: the price of undoing all of its change (a merged fine-tune).

    Args:
        changes: tensor to the relative size of its change.
        undone: measured divergence when every change is undone.
    """
    total = sum(changes.values())
    return {
        name: SWALLOW_STEEPNESS * undone * change / total if total > 0 else 0.0
        for name, change in changes.items()
    }


def options(  # noqa: PLR0913 - the parts of a price
    sizes: Mapping[str, int],
    errors: Mapping[str, float],
    swallowed: Mapping[str, float],
    scale: float,
    swallow_price: float,
    *,
    fast_types: Collection[str] = FAST_TYPES,
    seconds: Mapping[str, float] | None = None,
) -> list[Option]:
    """A tensor's options in a fixed order.

    Args:
        sizes: type to bytes of this tensor; only types that its shape allows.
        errors: type to relative error; a type without an entry keeps the weights exactly.
        swallowed: type to the share of the tensor's change that it undoes.
        scale: from :func:`scales`; ``swallow_price``: from :func:`swallow_prices`.
        swallow_price: see above.
        fast_types: preferred among equals.
        seconds: type to what the tensor takes of one token's time; None when that is not known.
    """
    times = seconds or {}
    return [
        Option(
            name,
            sizes[name],
            (scale * errors.get(name, 0.0) + swallow_price * swallowed.get(name, 0.0))
            * (1.0 if name in fast_types else SLOW_FACTOR),
            times.get(name, 0.0),
        )
        for name in sorted(sizes, key=lambda name: (sizes[name], name))
    ]
