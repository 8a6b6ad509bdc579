"""What a lab saw: written, read, and only about the variants that are released."""

from __future__ import annotations

import msgspec
import pytest

from slmops.artifact.lab_evidence import (
    LabDevice,
    LabNetwork,
    LabReport,
    decode_lab,
    encode_lab,
    for_evidence,
)
from slmops.core.errors import UsageError

DEVICE = LabDevice(
    variant_sha256="a" * 64,
    profile="pi5-8gb",
    runtime="llama.cpp",
    runtime_version="1",
    arch="x86_64",
    emulated=True,
    limits={"memory_bytes": "cgroup1: private memory"},
    network=LabNetwork("flaky", 3, 1, 1),
    outcome="committed",
    reason="",
    golden_kept=3,
    golden_prompts=3,
    asked=8,
    failed=0,
    fetched_bytes=1000,
    seconds=2.5,
)
REPORT = LabReport(1, "m", "b" * 64, "2026-11-24T12:00:00+00:00", "0.1.0", "x86_64, 2 cores", (DEVICE,))


def test_a_report_survives_its_file() -> None:
    assert decode_lab(encode_lab(REPORT), "lab.json") == REPORT
    newer = encode_lab(msgspec.structs.replace(REPORT, schema=2))
    with pytest.raises(UsageError, match="schema 2"):
        decode_lab(newer, "lab.json")
    with pytest.raises(UsageError, match=r"lab\.json cannot be read"):
        decode_lab(b"{", "lab.json")


@pytest.mark.parametrize("change", [{"outcome": "refused"}, {"failed": 1}])
def test_it_passes_only_when_every_device_serves(change: dict[str, object]) -> None:
    assert REPORT.passed
    bad = msgspec.structs.replace(DEVICE, **change)
    assert not msgspec.structs.replace(REPORT, devices=(DEVICE, bad)).passed


def test_entries_about_other_variants_are_no_evidence() -> None:
    other = msgspec.structs.replace(DEVICE, variant_sha256="c" * 64)
    evidence, stale = for_evidence(
        msgspec.structs.replace(REPORT, devices=(DEVICE, other)), frozenset({"a" * 64})
    )
    assert [device["variant_sha256"] for device in evidence["devices"]] == ["a" * 64]
    assert stale == (other,)
