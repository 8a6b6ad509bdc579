"""What a build means, in plain words: what was chosen for each profile, what that costs in quality, and what would help.

Every sentence rests on a figure of the build's evidence; where there is no figure there is no sentence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.artifact.build_index import Build
from slmops.build.verdicts import MACHINE_METRICS
from slmops.core.evidence.gates import Verdict

_WHY = {
    "enough": "more bytes would gain next to nothing",
    "knee": "a smaller file would be faster, but quality falls steeply below this size",
    "decode_tps": "a larger file would decode slower than people like to wait for",
    "two_in_memory": "so old and new model fit into memory together and an update swaps without a pause",
    "memory": "it is all that the profile's memory holds beside KV cache and buffers",
    "disk": "three files of a model must fit on the profile's disk",
    "artifact_bytes": "the recipe's budget",
    "ram_bytes": "it is all that the memory budget holds beside KV cache and buffers",
}
#: mean KL divergence, nats a token, below which a further MB is not worth asking for
_GOOD_KLD = 0.02
_KNEE_BITS = 4.9
#: another way to serve is worth a sentence when it leaves at most this share of the expected divergence
_WORTH_SAYING = 0.8
_MANY_ROWS = 32_000


def evidence_of(folder: Path, build: Build) -> dict[str, Any]:
    """The build's evidence."""
    value: dict[str, Any] = json.loads((folder / build.evidence.path).read_bytes())
    return value


def explain(build: Build, evidence: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each variant ``profile``, ``chosen``, ``cost`` and ``help``: lists of sentences."""
    rows = []
    for variant, row in zip(build.variants, evidence["variants"], strict=True):
        rows.append(
            {
                "profile": variant.profile,
                "chosen": _chosen(row),
                "cost": _cost(row, evidence),
                "help": _help(row, evidence, variant.shape),
            }
        )
    return rows


def points(build: Build) -> list[dict[str, Any]]:
    """Variants as points: ``profile``, ``artifact_bytes``, ``kld_mean``, ``decode_tps``, and whether another beats it.

    ``pareto`` is False where another variant is no larger, no further from the unquantised model and no slower, and better
    in one of the three.
    """
    found = [
        {
            "profile": v.profile,
            "artifact_bytes": v.artifact_bytes,
            "kld_mean": v.measured.kld_mean,
            "decode_tps": v.measured.decode_tps,
        }
        for v in build.variants
    ]
    for one in found:
        one["pareto"] = not any(_beats(other, one) for other in found)
    return found


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    ours = (one["artifact_bytes"], one["kld_mean"], -one["decode_tps"])
    theirs = (other["artifact_bytes"], other["kld_mean"], -other["decode_tps"])
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def _chosen(row: Mapping[str, Any]) -> list[str]:
    figures, budget = row["figures"], row["budget"]
    types = sorted(row["quantised"].items(), key=lambda item: -item[1])
    mix = ", ".join(f"{count} in {name}" for name, count in types if name != "F32")
    derived = budget.get("derived")
    why = _WHY[derived["because"] if derived and budget["bound"] == "artifact_bytes" else budget["bound"]]
    said = [
        f"{_mb(row['artifact_bytes'])}, {figures['bits_per_weight']:.1f} bits a weight; "
        f"{_mb(budget['allowed_bytes'])} were allowed: {why}",
        f"matrices: {mix}",
        *_served(row),
        f"{figures['decode_tps']:.0f} tokens/s measured here with one thread, {figures['predicted_decode_tps']:.0f} "
        f"predicted on the device; {_mb(figures['rss_bytes'])} of memory at most",
    ]
    tokens = row.get("golden", {}).get("tokens")
    if tokens and figures.get("prefill_tps"):
        said.append(
            f"a device scores {tokens} tokens of its golden pack before it commits, {tokens / figures['prefill_tps']:.0f} s at "
            f"the {figures['prefill_tps']:.0f} tokens/s of prefill measured here, and as many of the committed release's pack"
        )
    return said


def _served(row: Mapping[str, Any]) -> list[str]:
    if "serving" not in row:  # a build of an earlier version
        return []
    serving, price = row["serving"], row["kv_cache_kld"]
    said = (
        f"its memory was reckoned with kv_cache {serving['kv_cache']}, {serving['context_tokens']} tokens of context, "
        f"{serving['parallel']} at once: say so under serving: of the blueprint"
    )
    return [said + (f"; the cache type costs about {price:.4f} nats a token" if price > 0 else "")]


def _more_for_weights(row: Mapping[str, Any]) -> list[str]:
    """Where memory is the bound: what another way to serve would leave for weights."""
    ways = [way for way in row["memory"] if way["expected_kld"] is not None] if "serving" in row else []
    best = min(ways, key=lambda way: way["expected_kld"] + (way["kv_cache_kld"] or 0.0), default=None)
    if best is None or best["allowed_bytes"] <= row["budget"]["allowed_bytes"]:
        return []
    expected = best["expected_kld"] + (best["kv_cache_kld"] or 0.0)
    if expected > _WORTH_SAYING * (row["expected_kld"] + row["kv_cache_kld"]):
        return []
    unknown = "" if best["kv_cache_kld"] is not None else ", not counting what the cache type itself costs"
    return [
        f"served with kv_cache {best['kv_cache']} and {best['context_tokens']} tokens of context, memory would leave "
        f"{_mb(best['allowed_bytes'])} for the file: divergence {expected:.3f} expected where this one has "
        f"{row['expected_kld'] + row['kv_cache_kld']:.3f}{unknown}"
    ]


def _cost(row: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[str]:
    figures, said = row["figures"], []
    flips, items = figures.get("flips_ratio"), int(figures["items"])
    if flips is not None and items:
        count = round(flips * items)
        said.append(
            f"it answers all {items} held-out items word for word as the unquantised model does"
            if count == 0
            else f"it answers {_share(flips)} held-out items ({count} of {items}) differently from the unquantised model"
        )
    same = figures["same_top_ratio"]
    tokens = figures["scored_tokens"]
    if same >= 1:
        said.append(f"its likeliest next token was the unquantised model's at all of {tokens} places")
    else:
        said.append(
            f"at {_one_in(1 - same)} of {tokens} places its likeliest next token is another one "
            f"(mean KL divergence {figures['kld_mean']:.4f} nats a token)"
        )
    before, after = evidence["reference"].get("exact_match_ratio"), figures.get("exact_match_ratio")
    if before is not None and after is not None:
        said.append(
            f"exactly right: {round(after * items)} of {items}, "
            f"unquantised {round(before * int(evidence['reference']['items']))} of {evidence['reference']['items']}"
        )
        if before == 0 and after == 0:
            said.append("it never answers exactly right, but neither does the model before quantising")
    for gate in row["gates"]:
        if gate["verdict"] in (Verdict.FAIL.value, Verdict.ERROR.value):
            said.append(f"gate {gate['gate']} did not pass: {gate['reason']}")
    return said


def _help(row: Mapping[str, Any], evidence: Mapping[str, Any], shape: Mapping[str, int]) -> list[str]:
    figures, said = row["figures"], []
    needed = [
        gate for gate in row["gates"] if gate["verdict"] == Verdict.INCONCLUSIVE.value and gate["needed"]
    ]
    for gate in needed:
        if gate["gate"] in MACHINE_METRICS:
            said.append(f"a measurement on a device of the profile would settle gate {gate['gate']}")
            continue
        unit = "items" if gate["gate"].startswith("task.") else "held-out texts"
        said.append(f"about {gate['needed']} more {unit} would settle gate {gate['gate']}")
    split = evidence.get("split")
    ungated = not any(gate["gate"].startswith("task.") for gate in row["gates"])
    if ungated and evidence.get("task_kind") == "text":
        said.append(
            "a look at some answers: the task is text, of which many are right, so only likelihoods were gated; a gate on "
            "task.exact_match makes sense where one answer is right"
        )
    elif split is not None and ungated:
        said.append(
            f"more examples: {split['examples']} were given, so {split['held_out']} could be held out, too few to gate the "
            "task itself; about 180 make a gate of 5 points possible"
        )
    said += _more_for_weights(row)
    before = evidence["reference"].get("exact_match_ratio")
    if before is not None and before < 0.5 and evidence["reference"]["items"]:
        said.append(
            f"a model that knows the task: unquantised it is exactly right on {before:.0%} of the items, which no file format "
            "mends; fine-tune it (a merge or distil step)"
        )
    if figures["kld_mean"] > _GOOD_KLD and figures["bits_per_weight"] < 6.5:
        more = int(shape["parameters"] / 8)  # one bit a weight
        said.append(
            f"a budget larger by {_mb(more)} (one more bit a weight): divergence is {figures['kld_mean']:.3f}, and with "
            "each bit it fell by about half where we measured it, on a 135M model"
        )
    embedding = shape["vocabulary"] * shape["hidden"]
    share = embedding / shape["parameters"]
    if figures["bits_per_weight"] < _KNEE_BITS and share > 0.15 and shape["vocabulary"] > _MANY_ROWS:
        said.append(
            f"a smaller vocabulary (prune: keep_vocabulary_tokens): {shape['vocabulary']} tokens take {share:.0%} of the weights"
        )
    return said


def _one_in(ratio: float) -> str:
    return f"1 in {round(1 / ratio)}" if ratio <= 0.5 else f"{ratio:.0%}"


def _share(ratio: float) -> str:
    """A share of what comes next in the sentence."""
    return "all" if ratio >= 1 else _one_in(ratio) + (" of the" if ratio > 0.5 else "")


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def plot(rows: Sequence[Mapping[str, Any]], width: int = 60, height: int = 12) -> list[str]:
    """A small text plot: bytes to the right, divergence upwards; each point is its number in the table.

    Args:
        rows: as :func:`points` gives them, at least one.
        width: characters.
        height: lines.
    """
    sizes = [row["artifact_bytes"] / 1e6 for row in rows]
    losses = [row["kld_mean"] for row in rows]
    grid = [[" "] * width for _ in range(height)]
    for number, (size, loss) in enumerate(zip(sizes, losses, strict=True), start=1):
        column = round(_place(size, sizes) * (width - 1))
        line = height - 1 - round(_place(loss, losses) * (height - 1))
        while grid[line][column] != " " and column + 1 < width:
            column += 1
        grid[line][column] = str(number)[-1]
    margin = max(len(f"{value:.3f}") for value in losses)
    lines = []
    for index, cells in enumerate(grid):
        label = f"{max(losses):.3f}" if index == 0 else f"{min(losses):.3f}" if index == height - 1 else ""
        lines.append(f"{label:>{margin}} |{''.join(cells)}".rstrip())
    lines.append(f"{'':>{margin}} +{'-' * width}")
    left, right = f"{min(sizes):.1f} MB", f"{max(sizes):.1f} MB"
    lines.append(f"{'':>{margin}}  {left}{right:>{max(width - len(left), 1)}}")
    lines.append(f"{'':>{margin}}  mean KL divergence (up) by size of the file (right)")
    return lines


def _place(value: float, among: Sequence[float]) -> float:
    """0..1 between smallest and largest; in the middle when all are equal."""
    low, high = min(among), max(among)
    return (value - low) / (high - low) if high > low else 0.5
