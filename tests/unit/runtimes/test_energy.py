"""RAPL counters as files: summed over packages, put right when they wrap, and never invented."""

from __future__ import annotations

from pathlib import Path

from slmops.runtimes.energy import joules_between, read_energy


def _package(root: Path, name: str, value: int) -> None:
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")


def test_packages_are_summed_and_wrap_around(tmp_path: Path) -> None:
    _package(tmp_path, "intel-rapl:0", 100)
    _package(tmp_path, "intel-rapl:1", 999_000)
    _package(tmp_path, "intel-rapl:0:0", 5)  # a part of package 0: not counted twice
    before = read_energy(tmp_path)
    _package(tmp_path, "intel-rapl:0", 500_100)
    _package(tmp_path, "intel-rapl:1", 249_000)
    assert joules_between(before, read_energy(tmp_path), tmp_path) == 0.5 + 0.25


def test_without_counters_it_says_so(tmp_path: Path) -> None:
    reading = read_energy(tmp_path)
    assert reading.reason.startswith("not measured")
    assert joules_between(reading, reading, tmp_path) is None
