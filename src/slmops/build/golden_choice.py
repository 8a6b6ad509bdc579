"""Choosing golden prompts for power: those whose outcome moves most under plausible faults, each fault covered.

Pure arithmetic on scores. For a candidate prompt and a fault, the **pull** is how far the fault moves the answer's mean
log-probability, in units of what the device would tolerate: beyond 1 its own pack notices, or the committed release's floor.
Benign variation is in the unit: a prompt that quantising alone moves gets a wide tolerance, so it pulls little.

Prompts are taken greedily by what they add. A fault counts for the largest pull in the pack and half as much for the second,
each capped, so that one prompt which reacts to everything does not make the others useless, and two see each fault where they
can. Between equals decides how much of the vocabulary a prompt adds (a faulty embedding is only seen by those who use its
rows), then the given order.

A model that knows its task is sure of its right answers, and what it is sure of hardly moves: measured on the example, a lost
attention output moved right answers by a hundredth of their tolerance and unsure ones by up to twice theirs. So answers that
the model got wrong are candidates, too, for at most half of the pack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

#: a pull beyond this adds nothing: it is noticed for sure
ENOUGH_PULL = 3.0
#: what a new part of the vocabulary adds
_PART_WORTH = 0.02
#: the vocabulary is looked at in so many parts
VOCABULARY_PARTS = 64


def tolerances(reference: Mapping[str, float], variant: Mapping[str, float], base: float) -> dict[str, float]:
    """What each prompt's tolerance will be: as :func:`slmops.build.steps.golden.expectations_of` makes it."""
    distance = {name: abs(variant[name] - reference[name]) for name in reference}
    mean = sum(distance.values()) / len(distance)
    return {name: base + 2 * max(value, mean) for name, value in distance.items()}


def pulls(
    reference: Mapping[str, float],
    variant: Mapping[str, float],
    faulty: Mapping[str, float | None],
    *,
    base: float,
    slack: float,
) -> dict[str, float]:
    """How far one fault moves each prompt, in units of what is tolerated.

    Args:
        reference: mean log-probability of each answer under the unquantised model; ``variant``: under a good variant.
        variant: see above.
        faulty: under the faulty variant; None: not scored, which is noticed.
        base: tolerance of an exact variant, nats.
        slack: of the floor below the worst good model, nats.
    """
    allowed = tolerances(reference, variant, base)
    found = {}
    for name, good in reference.items():
        value = faulty[name]
        if value is None or math.isnan(value):
            found[name] = ENOUGH_PULL
            continue
        below = (min(good, variant[name]) - value) / slack
        found[name] = min(max(abs(value - good) / allowed[name], below, 0.0), ENOUGH_PULL)
    return found


def choose(
    candidates: Sequence[str],
    pull: Mapping[str, Mapping[str, float]],
    parts: Mapping[str, frozenset[int]],
    count: int,
    unsure: frozenset[str] = frozenset(),
) -> list[str]:
    """The prompts of a pack, in the order in which they were taken.

    Args:
        candidates: ids, best first where nothing else decides.
        pull: fault to candidate to pull, see :func:`pulls`.
        parts: candidate to the parts of the vocabulary that it uses.
        count: prompts wanted.
        unsure: candidates of which at most half of the pack is made, as long as there are others.
    """
    chosen: list[str] = []
    seen: set[int] = set()
    while len(chosen) < min(count, len(candidates)):
        best, worth = "", -1.0
        for name in candidates:
            full = len(unsure.intersection(chosen)) >= count // 2 and not unsure.issuperset(
                set(candidates) - set(chosen)
            )
            if name in chosen or (full and name in unsure):
                continue
            value = sum(_worth([row[other] for other in (*chosen, name)]) for row in pull.values())
            value += _PART_WORTH * len(seen | parts[name])
            if value > worth + 1e-9:
                best, worth = name, value
        chosen.append(best)
        seen |= parts[best]
    return chosen


def _worth(values: Sequence[float]) -> float:
    first, second = [*sorted(values, reverse=True), 0.0][:2]
    return first + second / 2


def vocabulary_parts(token_ids: Sequence[int], vocab_tokens: int) -> frozenset[int]:
    """Which parts of the vocabulary a sequence uses."""
    return frozenset(token * VOCABULARY_PARTS // max(vocab_tokens, 1) for token in token_ids)
