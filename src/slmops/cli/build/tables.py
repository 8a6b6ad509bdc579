"""A build for people: variants, gates, warnings, what pruning and recovery did."""

from __future__ import annotations

from typing import Any

import click

from slmops.cli.output import megabytes, percent, print_table
from slmops.core.evidence.gates import Verdict

_COLOURS = {
    Verdict.PASS.value: "green",
    Verdict.FAIL.value: "red",
    Verdict.ERROR.value: "red",
    Verdict.INCONCLUSIVE.value: "yellow",
}


_LIGHTS = {"amber": "yellow", "red": "red"}


def print_build(described: dict[str, Any]) -> None:
    """Everything that ``build run`` and ``build show`` print first."""
    print_variants(described["variants"])
    print_weight_steps(described["weight_steps"])
    for gate in described["gates"]:
        click.secho(f"{gate['verdict']:<12} ", fg=_COLOURS.get(gate["verdict"]), nl=False)
        of = variant_name(gate.get("profile", ""), gate.get("runtime", ""))
        click.echo(f"{of} {gate['gate']}: {gate['reason']}".strip())
    for warning in described["warnings"]:
        if warning["light"] != "green":
            click.secho(f"{'warning':<12} ", fg=_LIGHTS[warning["light"]], nl=False)
            of = variant_name(warning["profile"], warning.get("runtime", ""))
            sure = "" if warning["sure"] else ", not surely"
            click.echo(
                f"{of} {warning['signal']}: {warning['value']:.4g} is {warning['light']}{sure} "
                f"(amber from {warning['amber_from']:g}, red from {warning['red_from']:g}); it stops nothing by itself"
            )


def print_weight_steps(figures: dict[str, dict[str, Any]]) -> None:
    """What pruning, recovery and sparsity did, one line a step, and the sparsity report's verdict."""
    for name, value in figures.items():
        if "verdict" in value:
            click.echo(f"{name}: {value['verdict']}")
            continue
        shown = [
            f"{key} {number:.4g}" if isinstance(number, float) else f"{key} {number}"
            for key, number in value.items()
            if isinstance(number, (int, float, str))
        ]
        click.echo(f"{name}: {', '.join(shown)}")


def variant_name(profile: str, runtime: str) -> str:
    """A variant as recipes name it: the runtime is only said where it is not llama.cpp."""
    return profile if runtime in ("", "llama.cpp") else f"{profile}@{runtime}"


def print_variants(variants: list[dict[str, Any]]) -> None:
    """The variants' table, as ``build run``, ``build show`` and the demo print it."""
    rows = []
    for variant in variants:
        m = variant["measured"]
        rows.append(
            (
                variant_name(variant["profile"], variant["runtime"]["name"]),
                megabytes(variant["artifact_bytes"]),
                f"{m['bits_per_weight']:.2f}",
                f"{m['kld_mean']:.4f}",
                percent(m["same_top_ratio"]),
                f"{m['perplexity']:.2f}",
                f"{m['decode_tps']:.0f}",
                f"{m['prefill_tps']:.0f}",
                f"{m['load_s']:.1f}",
                megabytes(m["rss_bytes"]),
                percent(m.get("exact_match_ratio")),
                f"{percent(m.get('schema_valid_ratio'))} / {percent(m.get('schema_valid_constrained_ratio'))}",
            )
        )
    headings = (
        "variant",
        "bytes",
        "bits/w",
        "mean KL",
        "same top",
        "ppl",
        "decode/s",
        "prefill/s",
        "load s",
        "peak RSS",
        "exact",
        "valid JSON free / constrained",
    )
    print_table(headings, rows)
    click.echo("speed, load time and memory: measured on this machine, not on a device of the profile")
