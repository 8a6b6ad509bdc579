"""A device profile: the class of machines that one variant is built for.

A profile says what such a device has; what one device *measured* of itself (``agent bench``) travels beside
it as :class:`MeasuredSpeed` and wins over the profile's figures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from slmops.core.errors import UsageError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What every device of this profile has.

    Attributes:
        name: lower-case, at most 63 characters.
        arch: ``x86_64`` or ``aarch64``.
        ram_bytes: memory that slmops may use on the device (not the board's label: the OS has taken its
            part).
        disk_bytes: disk that slmops may use.
        cores: CPU cores that the engine may use.
        memory_bandwidth_bytes_s: sustained read rate while decoding, bytes per second; what bounds decode on
            CPUs.
        compute_flops: sustained multiply-add rate of prefill, operations per second.
        runtimes: inference engines that are installed, by name.
        accelerator: ``none`` or the accelerator's name.
        agent: whether slmops' agent runs there. Where it does not (Android, iOS), builds export and prove a
        model and hand it over as an archive; nothing is rolled out.
    """

    name: str
    arch: str
    ram_bytes: int
    disk_bytes: int
    cores: int
    memory_bandwidth_bytes_s: int
    compute_flops: int
    runtimes: tuple[str, ...] = ("llama.cpp",)
    accelerator: str = "none"
    agent: bool = True

    def __post_init__(self) -> None:
        """Refuse names and sizes that would only fail later, on a device."""
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"profile name {self.name!r} is not valid",
                hint="use a-z, 0-9, '.', '_' or '-', at most 63 characters, for example pi5-8gb",
            )
        for attribute in ("ram_bytes", "disk_bytes", "cores", "memory_bandwidth_bytes_s", "compute_flops"):
            value = getattr(self, attribute)
            if value <= 0:
                raise UsageError(
                    f"profile {self.name}: {attribute} must be positive, got {value}",
                    hint="give the device's real figure",
                )


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """What a device measured of itself with a known file; replaces the profile's speed figures.

    Attributes:
        weights_bytes: bytes of weights that each decoded token had to read.
        decode_tps: decode tokens per second with that file.
        prefill_tps: prompt tokens per second with that file; None if it was not measured.
        parameters: parameters of the model measured, for the prefill figure.
    """

    weights_bytes: int
    decode_tps: float
    prefill_tps: float | None = None
    parameters: int | None = None


MiB = 1 << 20
GiB = 1 << 30

#: Profiles that every installation knows. Bandwidths are sustained-read figures of such boards, *not*
#: measured by us: predictions made from them are marked "predicted" until a device of the profile has
#: measured itself.
BUILTIN_PROFILES: dict[str, DeviceProfile] = {
    profile.name: profile
    for profile in (
        DeviceProfile("pi-zero2-512mb", "aarch64", 400 * MiB, 2 * GiB, 4, 1_600_000_000, 8_000_000_000),
        DeviceProfile("pi5-8gb", "aarch64", 2 * GiB, 8 * GiB, 4, 9_000_000_000, 60_000_000_000),
        DeviceProfile("n100-16gb", "x86_64", 4 * GiB, 32 * GiB, 4, 16_000_000_000, 100_000_000_000),
        DeviceProfile(
            "android-mid",
            "aarch64",
            GiB,
            4 * GiB,
            4,
            10_000_000_000,
            60_000_000_000,
            runtimes=("litert-lm", "litert", "executorch"),
            agent=False,
        ),
        DeviceProfile(
            "ios-mid",
            "aarch64",
            GiB,
            4 * GiB,
            2,
            20_000_000_000,
            120_000_000_000,
            runtimes=("litert-lm", "executorch"),
            agent=False,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What one device reports of itself now; admission is decided on these, not on the profile's label.

    Attributes:
        ram_limit_bytes: memory that slmops may use here (cgroup or declared limit, else physical).
        disk_free_bytes: free bytes in the agent's directory.
        runtimes: engine name to version, for each engine that can be started here.
        cores: cores that the engine may use.
        speed: the device's own bench, when it has run.
    """

    ram_limit_bytes: int
    disk_free_bytes: int
    runtimes: dict[str, str] = field(default_factory=dict)
    cores: int = 1
    speed: MeasuredSpeed | None = None
