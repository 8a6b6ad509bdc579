"""Records as the pages want them: what to show of a device in one line, and a build's evidence in tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slmops.client.records import DeviceRecord, ReleaseDetail
from slmops.server.services.decisions import ACTIONS
from slmops.server.services.words import Role

ROLE_OF_ACTION: dict[str, Role] = {name: role for name, (role, _) in ACTIONS.items()}


@dataclass(frozen=True, slots=True)
class DeviceLine:
    """A device in one line; ``decode_tps`` is from its own bench."""

    record: DeviceRecord
    decode_tps: float | None
    phase: str
    labels: str


def device_line(device: DeviceRecord) -> DeviceLine:
    """What the fleet page shows of a device."""
    bench = device.facts.bench
    phase = "retired" if device.state == "retired" else device.phase or "never_seen"
    labels = ", ".join(f"{key}={value}" for key, value in sorted(device.labels.items()))
    return DeviceLine(device, None if bench is None else bench.decode_tps, phase, labels)


@dataclass(frozen=True, slots=True)
class GateLine:
    """One gate's answer about one variant."""

    profile: str
    gate: str
    verdict: str
    reason: str
    waived: str


@dataclass(frozen=True, slots=True)
class Score:
    """Task figures of one stage of the model."""

    stage: str
    exact_match: float | None
    schema_valid: float | None
    items: int | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """A build's evidence in tables; ``rest`` holds what no table of ours shows, flat."""

    gates: list[GateLine] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    rest: list[tuple[str, str]] = field(default_factory=list)


def evidence(release: ReleaseDetail) -> Evidence:
    """What is known of a release's evidence document, which the build writes as it likes."""
    document = release.evidence
    if not isinstance(document, dict):
        return Evidence()
    waived = {waiver.gate: waiver.reason for waiver in release.waivers}
    gates = [
        _gate(item, str(item.get("profile") or item.get("variant") or ""), waived)
        for item in _dicts(document, "gates")
    ]
    for variant in _dicts(document, "variants"):
        gates += [_gate(item, str(variant.get("profile", "")), waived) for item in _dicts(variant, "gates")]
    scores = [
        _score(stage, document[key])
        for key, stage in (("base", "base, before any step"), ("reference", "after the steps, unquantised"))
        if isinstance(document.get(key), dict)
    ]
    rest = [
        pair
        for pair in _flat(document, "")
        if not pair[0].startswith(("gates", "variants", "base.", "reference."))
    ]
    return Evidence(gates, scores, rest[:60])


def _dicts(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = document.get(name)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _gate(item: dict[str, Any], profile: str, waived: dict[str, str]) -> GateLine:
    gate = str(item.get("gate") or item.get("metric") or "")
    verdict = str(item.get("verdict", ""))
    reason = str(item.get("reason", ""))
    return GateLine(profile, gate, verdict, reason, waived.get(gate, "") if verdict != "pass" else "")


def _score(stage: str, figures: dict[str, Any]) -> Score:
    items = figures.get("items")
    return Score(
        stage,
        _rate(figures.get("exact_match_ratio")),
        _rate(figures.get("schema_valid_ratio")),
        items if isinstance(items, int) else None,
    )


def _rate(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _flat(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [
            pair
            for key, inner in value.items()
            for pair in _flat(inner, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(value, list):
        return [(path, f"{len(value)} entries")] if len(value) > 6 else [(path, ", ".join(map(str, value)))]
    return [(path, f"{value:.4g}" if isinstance(value, float) else str(value))]
