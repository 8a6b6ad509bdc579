"""Budgets from profiles: hard bounds hold, wishes give way at the knee, and nobody pays for bytes that gain nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.build.first_steps import asdict
from slmops.build.graph import StepContext
from slmops.build.steps.budget import ENOUGH_BITS, KNEE_BITS, bounds_of, derive
from slmops.core.device.fit import ModelShape, Serving, memory_needed
from slmops.core.device.profile import BUILTIN_PROFILES, DeviceProfile

#: SmolLM2-135M in F16
SHAPE = ModelShape(269_000_000, 134_515_008, 30, 192, 192, 576, 1536, 49152, 8192)
PI5 = BUILTIN_PROFILES["pi5-8gb"]


def decided(tmp_path: Path, profile: DeviceProfile, **params: Any) -> dict[str, Any]:
    model = make_tiny_gguf(tmp_path / "m.gguf")
    settings = {"profile": asdict(profile), "ram_bytes": profile.ram_bytes, "serving": asdict(Serving())}
    return derive(StepContext({"model": model}, {}, settings | params, tmp_path, lambda ratio, note: None))


def test_a_large_device_gets_enough_and_no_more(tmp_path: Path) -> None:
    bounds = bounds_of(SHAPE, PI5, Serving(), PI5.ram_bytes, 0)
    assert bounds["enough"] == int(134_515_008 * ENOUGH_BITS / 8)
    assert bounds["enough"] < min(bounds["decode_tps"], bounds["two_in_memory"], bounds["disk"])
    value = decided(tmp_path, PI5)
    assert (value["because"], value["artifact_bytes"]) == ("enough", value["bounds"]["enough"])


def test_a_slow_device_stops_at_the_knee(tmp_path: Path) -> None:
    """Comfort would ask for less than 4.9 bits a weight: quality wins, and the reason says so."""
    slow = replace(PI5, memory_bandwidth_bytes_s=20_000)
    value = decided(tmp_path, slow)
    assert (value["because"], value["artifact_bytes"]) == ("knee", value["bounds"]["knee"])
    bounds = bounds_of(SHAPE, BUILTIN_PROFILES["pi-zero2-512mb"], Serving(), 400 << 20, 0)
    assert bounds["decode_tps"] < bounds["knee"] == int(134_515_008 * KNEE_BITS / 8)


@pytest.mark.parametrize(("field", "name"), [("disk_bytes", "disk"), ("ram_bytes", "memory")])
def test_hard_bounds_hold_below_the_knee(tmp_path: Path, field: str, name: str) -> None:
    """Disk for three files, memory with cache and buffers: never exceeded, whatever that costs."""
    small = replace(PI5, disk_bytes=90_000) if field == "disk_bytes" else PI5
    tiny = ModelShape(0, 1, 2, 32, 32, 64, 256, 267, 2048)
    need = memory_needed(tiny, Serving()).total_bytes
    value = decided(tmp_path, small, **({} if name == "disk" else {"ram_bytes": need + 60_000}))
    assert value["because"] == name
    assert value["artifact_bytes"] == value["bounds"][name] < value["bounds"]["knee"]


def test_room_for_two_is_wished_for(tmp_path: Path) -> None:
    """Between knee and enough the device keeps room for old and new model at once."""
    tiny = ModelShape(0, 1, 2, 32, 32, 64, 256, 267, 2048)
    need = memory_needed(tiny, Serving()).total_bytes
    value = decided(tmp_path, PI5, ram_bytes=2 * (need + 90_000))
    assert value["because"] == "two_in_memory"
    assert value["bounds"]["knee"] < value["artifact_bytes"] < value["bounds"]["enough"]
