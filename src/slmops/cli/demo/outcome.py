"""How the demo ended: its summary as JSON values, as tables, and whether it is what the demo promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from slmops.cli.demo.load import Tally
from slmops.cli.output import megabytes, percent, print_table
from slmops.client.records import DeviceRecord, RolloutDetail
from slmops.core.rollout.machine import Phase

_MEASURED = (
    "bits_per_weight",
    "kld_mean",
    "same_top_ratio",
    "decode_tps",
    "rss_bytes",
    "exact_match_ratio",
)


def summary_of(
    described: Mapping[str, Any],
    rollouts: Sequence[RolloutDetail],
    tally: Tally,
    devices: Sequence[DeviceRecord],
    seconds: float,
) -> dict[str, Any]:
    """What ``--out`` writes.

    Args:
        described: the good build, as ``slmops build show --json`` gives it.
        rollouts: of the good release, of the bad one, and of one that was taken back where there was one.
        tally: what the client saw from the second on.
        devices: as the control plane knows them at the end.
        seconds: since the demo began.
    """
    return {
        "variants": [
            {
                "profile": variant["profile"],
                "runtime": variant["runtime"]["name"],
                "artifact_bytes": variant["artifact_bytes"],
                **{name: variant["measured"].get(name) for name in _MEASURED},
            }
            for variant in described["variants"]
        ],
        "scores": described["scores"],
        "rollouts": [
            {
                "release": f"{rollout.model}@{rollout.version}",
                "outcome": rollout.phase,
                "committed": rollout.counts.committed,
                "reverted": rollout.counts.reverted,
                "untouched": rollout.counts.untouched,
                "reason": rollout.reason,
            }
            for rollout in rollouts
        ],
        "requests": {
            "served": tally.served,
            "failed": tally.failed,
            "releases": dict(tally.releases),
            "problems": tally.problems,
        },
        "devices": [
            {"id": device.id, "profile": device.profile, "release": device.release, "state": device.phase}
            for device in devices
        ],
        "moved_bytes": sum(device.fetched_bytes for device in devices),
        "seconds": seconds,
    }


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print a summary for people."""
    rows = [
        (
            variant["profile"],
            variant["runtime"],
            megabytes(variant["artifact_bytes"]),
            f"{variant['bits_per_weight']:.2f}",
            f"{variant['kld_mean']:.4f}",
            percent(variant["same_top_ratio"]),
            f"{variant['decode_tps']:.0f}",
            megabytes(variant["rss_bytes"]),
            percent(variant["exact_match_ratio"]),
        )
        for variant in summary["variants"]
    ]
    print_table(
        ("variant", "runtime", "bytes", "bits/w", "mean KL", "same top", "decode/s", "peak RSS", "exact"),
        rows,
    )
    click.echo()
    print_table(
        ("release", "outcome", "committed", "reverted", "untouched"),
        [
            (r["release"], r["outcome"], r["committed"], r["reverted"], r["untouched"])
            for r in summary["rollouts"]
        ],
    )
    click.echo(f"\n{summary['rollouts'][1]['reason']}")
    requests = summary["requests"]
    click.echo(
        f"requests from the bad rollout on: {requests['served']} served, {requests['failed']} failed · "
        f"moved to devices: {megabytes(summary['moved_bytes'])} · {summary['seconds']:.0f} s"
    )


def unexpected(summary: Mapping[str, Any], fleet_size: int, good: str) -> list[str]:
    """What went otherwise than the demo promises; empty when all is well.

    Args:
        summary: from :func:`summary_of`.
        fleet_size: devices.
        good: version that every device must run in the end.
    """
    first, second, *taken_back = summary["rollouts"]
    problems = []
    if first["outcome"] != Phase.COMPLETED.value or first["committed"] != fleet_size:
        problems.append(f"the good release: {first['outcome']}, {first['committed']} of {fleet_size} devices")
    stopped = second["outcome"] == Phase.ROLLED_BACK.value and not second["committed"]
    if not stopped or second["untouched"] != fleet_size - 1:
        problems.append(
            f"the bad release: {second['outcome']}, {second['committed']} committed, {second['untouched']} untouched"
        )
    for third in taken_back:
        if third["outcome"] != Phase.ROLLED_BACK.value or third["reverted"] != fleet_size:
            problems.append(
                f"the release that was taken back: {third['outcome']}, {third['reverted']} of {fleet_size} reverted"
            )
    if summary["requests"]["failed"] or not summary["requests"]["served"]:
        problems.append(f"requests: {summary['requests']}")
    if any(not device["release"].endswith(good) for device in summary["devices"]):
        problems.append(f"devices: {summary['devices']}")
    return problems
