"""What ``build show`` and ``build diff`` say to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from slmops.build.report import plot

_HEADS = (
    ("chosen", "what was chosen"),
    ("cost", "what it costs in quality"),
    ("help", "what would help"),
)
#: figures where more is worse; of all others in a variant more is better, or neither
_WORSE_UP = ("kld_mean", "kld_p99", "perplexity", "load_s", "rss_bytes", "artifact_bytes", "flips_ratio")
_BETTER_UP = ("same_top_ratio", "decode_tps", "prefill_tps", "exact_match_ratio", "schema_valid_ratio")


def print_points(points: Sequence[Mapping[str, Any]]) -> None:
    """The Pareto table and the text plot, when there is more than one variant to compare."""
    if len(points) < 2:
        return
    click.echo("")
    for number, row in enumerate(points, start=1):
        mark = "*" if row["pareto"] else " "
        click.echo(
            f"{mark}{number} {row['profile']:<20} {row['artifact_bytes'] / 1e6:>8.1f} MB  KL {row['kld_mean']:.4f}  "
            f"{row['decode_tps']:>5.0f} tokens/s"
        )
    click.echo("(* no other variant is smaller, closer and faster)\n")
    for line in plot(points):
        click.echo(line)


def print_explained(explained: Sequence[Mapping[str, Any]]) -> None:
    """Sentences, variant by variant."""
    for row in explained:
        click.echo("")
        click.secho(row["profile"], bold=True)
        for key, title in _HEADS:
            if row[key]:
                click.echo(f"  {title}:")
                for sentence in row[key]:
                    click.echo(f"    - {sentence}")


def print_diff(difference: Mapping[str, Any], old: str, new: str) -> None:
    """What differs, with better and worse in words; figures that are equal are not listed."""
    if not difference:
        click.echo(f"{old} and {new} hold the same build")
        return
    for name, value in difference.items():
        if name == "variants":
            continue
        click.echo(f"{name}: {_change(name, value)}")
    for profile, changed in difference.get("variants", {}).items():
        click.echo("")
        click.secho(profile, bold=True)
        if isinstance(changed, str):
            click.echo(f"  {changed} in {new}" if changed == "added" else f"  only in {old}")
            continue
        for name, value in changed.items():
            click.echo(f"  {name:<28} {_change(name, value)}")


def _change(name: str, value: Any) -> str:
    if not isinstance(value, dict) or "old" not in value:
        return str(value)
    shown = f"{_plain(value['old'])} -> {_plain(value['new'])}"
    if "change" not in value:
        return shown
    ratio = f", {value['change'] / value['old']:+.1%}" if value["old"] else ""
    last = name.rpartition(".")[2]
    worse, better = last in _WORSE_UP, last in _BETTER_UP
    word = ""
    if worse or better:
        word = " (better)" if (value["change"] < 0) == worse else " (worse)"
    return f"{shown} ({_plain(value['change'], sign=True)}{ratio}){word}"


def _plain(value: Any, *, sign: bool = False) -> str:
    """A value for people: a digest by its beginning, a number without noise."""
    if isinstance(value, float):
        return f"{value:+.4g}" if sign else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:+,}" if sign else f"{value:,}"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text
