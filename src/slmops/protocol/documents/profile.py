"""``kind: DeviceProfile``: a class of devices."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slmops.core.device.profile import DeviceProfile
from slmops.protocol.documents.quantities import Bytes, Metadata, Section


class Profile(Section):
    """A class of devices: what all of them have."""

    api_version: Literal["slmops/v1"] = Field(alias="apiVersion")
    kind: Literal["DeviceProfile"]
    metadata: Metadata
    arch: Literal["x86_64", "aarch64"]
    ram_bytes: Bytes
    disk_bytes: Bytes
    cores: int
    memory_bandwidth_bytes_s: Bytes
    compute_flops: int
    runtimes: tuple[str, ...] = ("llama.cpp",)
    accelerator: str = "none"
    agent: bool = True

    def profile(self) -> DeviceProfile:
        """As the core wants it."""
        return DeviceProfile(
            name=self.metadata.name,
            arch=self.arch,
            ram_bytes=self.ram_bytes,
            disk_bytes=self.disk_bytes,
            cores=self.cores,
            memory_bandwidth_bytes_s=self.memory_bandwidth_bytes_s,
            compute_flops=self.compute_flops,
            runtimes=self.runtimes,
            accelerator=self.accelerator,
            agent=self.agent,
        )
