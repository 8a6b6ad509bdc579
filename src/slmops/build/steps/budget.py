"""A byte budget where the recipe gives none: what the profile can hold, and no more than is worth its bytes.

Hard bounds: the disk (old, new and one spare file), and the memory with KV cache and buffers. Wishes, which give way before
quality does (never below ``KNEE_BITS`` a weight): comfortable decode speed, and old and new model in memory together, so
that an update swaps without a pause. On top: beyond ``ENOUGH_BITS`` a weight next to nothing is gained.

The bits are where the measured curve bends (SmolLM2-135M, mean KL divergence from the unquantised model): 4.64 bits .040,
4.94 bits .030, 6.16 bits .011, 8.50 bits .004; below 4.9 bits it rises steeply, above 6.5 every further MB buys little.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.core.device.fit import ModelShape, Serving, effective_bandwidth, kv_cache_bytes, memory_needed
from slmops.core.device.profile import DeviceProfile

USES = ("slmops.build.gguf_file", "slmops.core.device.fit", "slmops.core.device.profile")
#: files of one model on a device's disk during an update: old, new, and one spare
FILES_ON_DISK = 3
#: faster than people read (some 5 tokens/s) with room for a busy device
COMFORT_TPS = 20.0
KNEE_BITS = 4.9
ENOUGH_BITS = 6.5


def derive(context: StepContext) -> dict[str, Any]:
    """Derive it. Files in: ``model`` (only its header is read). Params: ``profile`` (facts), ``ram_bytes``, ``serving``.

    Value: ``artifact_bytes``, ``because`` (the bound that decided), every bound in bytes, and ``without_memory``: what it would
    be by the others alone.
    """
    params = context.params
    facts = {**params["profile"], "runtimes": tuple(params["profile"]["runtimes"])}
    with open_gguf(context.files["model"]) as model:
        shape, header_bytes = model.layout.shape(), model.layout.tensors_start
    bounds = bounds_of(
        shape, DeviceProfile(**facts), Serving(**params["serving"]), int(params["ram_bytes"]), header_bytes
    )
    floor = bounds["knee"]
    wished = {name: max(bounds[name], floor) for name in ("decode_tps", "two_in_memory")}
    allowed = {"enough": bounds["enough"], **wished, "disk": bounds["disk"], "memory": bounds["memory"]}
    because = min(allowed, key=lambda name: allowed[name])
    if because in wished and bounds[because] < floor:
        because = "knee"
    beside = min(value for name, value in allowed.items() if name != "memory")
    return {
        "artifact_bytes": max(min(allowed.values()), 1),
        "because": because,
        "bounds": bounds,
        "without_memory": max(beside, 1),
    }


def bounds_of(
    shape: ModelShape, profile: DeviceProfile, serving: Serving, ram_bytes: int, header_bytes: int
) -> dict[str, int]:
    """The largest file by each bound, bytes.

    Args:
        shape: of the unquantised model.
        profile: of the target.
        serving: what it is served with.
        ram_bytes: memory that it may use.
        header_bytes: of its file.
    """
    rest = memory_needed(replace(shape, weights_bytes=0), serving).total_bytes
    read_bytes = effective_bandwidth(None, profile) / COMFORT_TPS
    cache_bytes = kv_cache_bytes(shape, serving) / serving.parallel / 2
    return {
        "enough": header_bytes + int(shape.parameters * ENOUGH_BITS / 8),
        "knee": header_bytes + int(shape.parameters * KNEE_BITS / 8),
        "decode_tps": header_bytes + int(max(read_bytes - cache_bytes, 0)),
        "two_in_memory": header_bytes + max(ram_bytes // 2 - rest, 0),
        "memory": header_bytes + max(ram_bytes - rest, 0),
        "disk": profile.disk_bytes // FILES_ON_DISK,
    }
