"""Energy of the processor package by Intel's RAPL counters, where the machine shows them. Standard library only.

The counter is the whole package's: on a machine with other work it says too much, never too little. It is read from
``/sys/class/powercap/intel-rapl:N`` (AMD's counters appear there too); cores of virtual machines and most ARM boards have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyReading:
    """Counters of all packages at one moment, microjoules; `reason` says why there are none."""

    values: dict[str, int]
    reason: str = ""


def read_energy(root: Path = _ROOT) -> EnergyReading:
    """Read the counters now."""
    domains = [path for path in sorted(root.glob("intel-rapl:*")) if path.name.count(":") == 1]
    if not domains:
        return EnergyReading({}, "not measured: this machine shows no RAPL counters")
    try:
        return EnergyReading({path.name: int((path / "energy_uj").read_text()) for path in domains})
    except (OSError, ValueError) as error:
        return EnergyReading({}, f"not measured: RAPL counters cannot be read ({type(error).__name__})")


def joules_between(before: EnergyReading, after: EnergyReading, root: Path = _ROOT) -> float | None:
    """Energy between two readings, None when it was not measured; a counter that wrapped around once is put right."""
    if not before.values or before.values.keys() != after.values.keys():
        return None
    total = 0
    for name, start in before.values.items():
        spent = after.values[name] - start
        if spent < 0:
            try:
                spent += int((root / name / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                return None
        total += spent
    return total / 1e6
