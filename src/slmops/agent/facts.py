"""What this device has: read from the machine, capped by its settings."""

from __future__ import annotations

import functools
import os
from importlib import metadata
from pathlib import Path

import msgspec

from slmops.agent.identity import DeviceConfig, machine_arch
from slmops.agent.store.files import free_bytes
from slmops.agent.store.layout import Layout
from slmops.artifact.digest import UNREADABLE_JSON
from slmops.core.device.fit import engine_for
from slmops.core.device.profile import BUILTIN_PROFILES, DeviceFacts, DeviceProfile, MeasuredSpeed
from slmops.core.errors import SlmopsError
from slmops.protocol.messages import Bench, Facts
from slmops.runtimes import load, names
from slmops.runtimes.external.config import ENVIRONMENT_VARIABLE as EXTERNAL_VARIABLE

#: free disk is reported again only when it moved by this much
_DISK_STEP_BYTES = 64 << 20
_FINE_DISK_STEP_BYTES = 1 << 20


def use_external_server(layout: Layout) -> None:
    """Let the runtime `external` find the device's own configuration, where the device has one."""
    if layout.external.exists():
        os.environ[EXTERNAL_VARIABLE] = str(layout.external.absolute())


def read_facts(layout: Layout, config: DeviceConfig, limits: dict[str, str] | None = None) -> Facts:
    """This device's facts now."""
    return Facts(
        arch=machine_arch(),
        cores=os.cpu_count() or 1,
        ram_limit_bytes=config.ram_limit_bytes or memory_limit_bytes(),
        disk_free_bytes=rounded_disk(free_bytes(layout.root)),
        runtimes=usable_runtimes(config),
        agent_version=metadata.version("slmops"),
        limits=limits or {},
        bench=read_bench(layout),
    )


def rounded_disk(free: int) -> int:
    """Free disk rounded down: coarsely where there is much, finely where each megabyte counts."""
    step = _DISK_STEP_BYTES if free >= 4 * _DISK_STEP_BYTES else _FINE_DISK_STEP_BYTES
    return free // step * step if free >= step else free


def device_facts(facts: Facts, runtime: str) -> DeviceFacts:
    """The same, as the fit of a variant of this runtime wants it."""
    bench = facts.bench
    speed = (
        MeasuredSpeed(bench.weights_bytes, bench.decode_tps, bench.prefill_tps, bench.parameters)
        if bench is not None and bench.speaks_of(engine_for(runtime, facts.runtimes) or runtime)
        else None
    )
    return DeviceFacts(facts.ram_limit_bytes, facts.disk_free_bytes, facts.runtimes, facts.cores, speed)


def profile_of(name: str, facts: Facts) -> DeviceProfile:
    """The named profile; for one that this version does not know, a cautious guess from the facts."""
    known = BUILTIN_PROFILES.get(name)
    if known is not None:
        return known
    return DeviceProfile(
        name,
        facts.arch,
        facts.ram_limit_bytes,
        max(facts.disk_free_bytes, 1),
        facts.cores,
        4_000_000_000,
        20_000_000_000,
    )


def usable_runtimes(config: DeviceConfig) -> dict[str, str]:
    """Engines that this device may use, with their versions."""
    found = installed_runtimes(config.extra_runtime)
    return {
        name: version for name, version in found.items() if not config.runtimes or name in config.runtimes
    }


@functools.lru_cache  # looked up in package metadata: some 20 ms, and it cannot change while the agent runs
def installed_runtimes(override: str = "") -> dict[str, str]:
    """Engines that can be started here, with their versions: no release can name another one, signed or not."""
    found: dict[str, str] = {}
    for name in (*names(), *((override,) if override else ())):
        try:
            found[name] = load(name).version()
        except SlmopsError:
            continue
    return found


def memory_limit_bytes() -> int:
    """Memory of this machine, or of the cgroup that this process is in when that is smaller."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(physical, int(Path(path).read_text(encoding="ascii").strip()))
        except (OSError, ValueError):
            continue
    return physical


def read_bench(layout: Layout) -> Bench | None:
    """The device's last bench; None when it has none."""
    try:
        return msgspec.json.decode(layout.bench.read_bytes(), type=Bench)
    except (FileNotFoundError, *UNREADABLE_JSON):
        return None
