"""How a model is made faulty: from a good file to a bad one, the same bytes for the same arguments.

Owns what a fault is and the writing of faulty copies; what is changed in a file is said by :mod:`slmops.build.fault_edits`, which
faults there are by :mod:`slmops.build.fault_catalogue`. A copy is whole, and its tensors keep type and size, so that only their
content is wrong, and the file loads.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, metadata_ranges, open_gguf, padded
from slmops.core.errors import BuildError
from slmops.runtimes import EngineSpec


@dataclass
class Patch:
    """What a fault does to one file.

    Attributes:
        metadata: key to the raw value (type and content) that replaces or adds it.
        blobs: tensor to its new bytes.
    """

    metadata: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)


Change = Callable[[GgufFile, "Patch", np.random.Generator], None]


@dataclass(frozen=True)
class Fault:
    """One way to be broken.

    Attributes:
        name: short, unique.
        what: what happened, in words.
        change: of the file; None: the file is whole.
        settings: of the engine, laid over the good ones.
        lost_adapter: the file is the untouched base instead.
        probe: used to choose prompts; a bench that measures power must not count on these alone.
    """

    name: str
    what: str
    change: Change | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    lost_adapter: bool = False
    probe: bool = False

    def spec(self, good: EngineSpec) -> EngineSpec:
        """The engine's settings under this fault."""
        return replace(good, **self.settings)


def faulty_copy(source: Path, target: Path, fault: Fault, seed: int = 0) -> None:
    """Write a faulty copy of a GGUF file; the same bytes for the same arguments.

    Raises:
        BuildError: the model has not what the fault needs (a tensor, a layer).
    """
    if fault.change is None:
        shutil.copyfile(source, target)
        return
    with open_gguf(source) as model:
        patch = Patch()
        fault.change(model, patch, np.random.default_rng(seed))
        for name, blob in patch.blobs.items():
            tensor = tensor_of(model, name)
            if len(blob) != tensor.size_bytes:
                raise BuildError(
                    f"fault {fault.name}: {name} has {tensor.size_bytes} bytes, got {len(blob)}",
                    hint="report it",
                )
        begin = min(tensor.offset for tensor in model.layout.tensors)
        header = _header(model, patch.metadata)
        with target.open("wb") as sink:
            sink.write(header)
            at = begin
            for tensor in sorted(model.layout.tensors, key=lambda t: t.offset):
                sink.write(model.content[at : tensor.offset])
                sink.write(patch.blobs.get(tensor.name) or model.blob(tensor))
                at = tensor.offset + tensor.size_bytes
            sink.write(model.content[at : len(model.content)])


def _header(model: GgufFile, changed: Mapping[str, bytes]) -> bytes:
    content = model.content
    ranges = metadata_ranges(content)
    pairs = [
        key_bytes(key) + changed[key] if key in changed else bytes(content[begin:end])
        for key, begin, end in ranges
    ]
    known = {key for key, _, _ in ranges}
    pairs += [key_bytes(key) + value for key, value in changed.items() if key not in known]
    at = ranges[-1][2] if ranges else 24
    count = len(model.layout.tensors)
    end = at
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", content, end)
        (dimensions,) = struct.unpack_from("<I", content, end + 8 + length)
        end += 8 + length + 4 + 8 * dimensions + 4 + 8
    header = b"GGUF" + struct.pack("<IQQ", 3, count, len(pairs)) + b"".join(pairs) + bytes(content[at:end])
    return header + b"\0" * (padded(len(header)) - len(header))


def key_bytes(text: str) -> bytes:
    """Text as GGUF stores it: its length, then its bytes."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def tensor_of(model: GgufFile, name: str) -> Tensor:
    """A tensor by name.

    Raises:
        BuildError: the model has none of that name.
    """
    tensor = model.tensor(name)
    if tensor is None:
        raise BuildError(
            f"fault: the model has no tensor {name}", hint="this fault is not for this architecture"
        )
    return tensor
