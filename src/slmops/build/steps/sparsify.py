"""Sparsity: zeros by Wanda, and a measured verdict on what they are worth on the runtime that ships.

Wanda compares weights of one output with each other by ``|W_ij| * sqrt(E[x_j^2])`` and sets the least to zero: half of all
(*unstructured*), or all but N of every M neighbours (*N:M*). Embeddings and vectors are left alone.

A zero saves nothing by itself. A runtime must have kernels that skip it, or the file must be compressed. So the report puts the
sparse variant beside a twin from the dense weights, with the same type for every tensor, and measures both in one run.

Source: Sun et al. 2023, arXiv:2306.11695 (Wanda), section 3.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, NewTensor, open_gguf, write_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.calibrate import read_imatrix
from slmops.build.steps.prune_blocks import calibration_windows
from slmops.core.device.fit import Serving
from slmops.core.errors import BuildError
from slmops.runtimes import EngineSpec
from slmops.runtimes.bench import bench_model
from slmops.runtimes.llama_cpp.imatrix import collect_imatrix
from slmops.runtimes.llama_cpp.quantise import quantise_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

USES = (
    "slmops.artifact.gguf_layout",
    "slmops.build.gguf_file",
    "slmops.build.steps.calibrate",
    "slmops.build.steps.prune_blocks",
    "slmops.runtimes.bench",
    "slmops.runtimes.llama_cpp.imatrix",
    "slmops.runtimes.llama_cpp.logits",
    "slmops.runtimes.llama_cpp.quantise",
)
_SPARSE = re.compile(r"^blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight$")
_N_OF_M = re.compile(r"^(\d+):(\d+)$")
#: a change smaller than this is not worth a step of its own, and not told from noise
WORTH = 0.05
ZLIB_LEVEL = 6
_BLOCK_BYTES = 1 << 22


def sparsify(context: StepContext) -> dict[str, Any]:
    """Set weights to zero.

    Files in: ``model`` (F16), ``text`` (calibration); out: ``model.gguf``. Params: ``pattern`` (``N:M`` or ``unstructured``),
    ``ratio`` (for ``unstructured``: share of zeros). Value: ``zeros_ratio`` of the sparse tensors, how many there are.

    Raises:
        BuildError: rows cannot be cut into groups of M.
    """
    pattern, ratio = str(context.params["pattern"]), float(context.params["ratio"])
    context.progress(0.05, "collecting activations")
    windows = calibration_windows(context.files["text"], int(context.params["tokens"]))
    flat = [token for window in windows for token in window]
    importance = collect_imatrix(context.files["model"], flat, window_tokens=len(windows[0]), threads=1).sums
    zeros = total = count = 0
    with open_gguf(context.files["model"]) as model:

        def make(tensor: Tensor) -> bytes:
            nonlocal zeros, total
            kept = keep_mask(model.rows(tensor), importance[tensor.name], pattern, ratio)
            zeros, total = zeros + int((~kept).sum()), total + kept.size
            return (model.rows(tensor) * kept).astype("<f2").tobytes()

        tensors = []
        for tensor in model.layout.tensors:
            if _SPARSE.match(tensor.name) and tensor.name in importance:
                count += 1
                tensors.append(NewTensor(tensor.name, "F16", tensor.shape, partial(make, tensor)))
            else:
                tensors.append(_as_it_is(model, tensor))
        if not count:
            raise BuildError(
                f"sparsify: architecture {model.layout.architecture!r} has no tensors like blk.0.attn_q.weight",
                hint="leave the step out",
            )
        write_gguf(
            context.out / "model.gguf",
            model,
            tensors,
            replace={},
            progress=lambda done: context.progress(0.3 + 0.7 * done, "setting zeros"),
        )
    return {"pattern": pattern, "zeros_ratio": zeros / total, "tensors": count}


def keep_mask(
    rows: NDArray[np.float32], importance: NDArray[np.float32], pattern: str, ratio: float
) -> NDArray[np.bool_]:
    """Which weights stay, by Wanda.

    Args:
        rows: shape (out, in).
        importance: mean squared input, shape (in,).
        pattern: ``N:M`` keeps N of M neighbours in a row; ``unstructured`` keeps all but ``ratio`` of each row.
        ratio: see above.

    Returns: shape (out, in).

    Raises:
        BuildError: ``in`` is no multiple of M.
    """
    scores = np.abs(rows) * np.sqrt(importance)[None, :]
    match = _N_OF_M.match(pattern)
    if match is None:
        grouped, keep = scores[:, None, :], scores.shape[1] - round(ratio * scores.shape[1])
    else:
        keep, size = int(match[1]), int(match[2])
        if scores.shape[1] % size:
            raise BuildError(
                f"sparsify: rows of {scores.shape[1]} weights cannot be cut into groups of {size}",
                hint="give a pattern whose second number divides the model's widths, like 2:4",
            )
        grouped = scores.reshape(len(scores), -1, size)  # Shape: (out, in / size, size)
    order = np.argsort(-grouped, axis=-1, kind="stable")
    kept = np.zeros(grouped.shape, dtype=bool)
    np.put_along_axis(kept, order[..., :keep], True, axis=-1)
    return kept.reshape(scores.shape)


def report(context: StepContext) -> dict[str, Any]:
    """Measure what the zeros are worth: the sparse variant beside a dense twin of the same types.

    Files in: ``dense`` (F16, as it was before the step), ``variant`` (sparse, as it ships), ``imatrix``. Values in: ``choice``.
    Params: ``serving``, ``prompt_tokens``, ``decode_tokens``, ``repeats``; ``profile`` of the variant, ``others``: profiles
    whose variants are not measured. Value: ``runtime``, ``profile``, ``others``; ``dense`` and ``sparse`` figures; ratios
    sparse to dense; ``verdict`` in plain words.
    """
    twin = context.out / ".twin.gguf"
    importance = read_imatrix(context.files["imatrix"])
    types: Mapping[str, str] = context.values["choice"]["types"]
    with open_gguf(context.files["dense"]) as dense:

        def make(tensor: Tensor) -> bytes:
            return quantise_rows(types[tensor.name], dense.rows(tensor), importance.get(tensor.name))

        tensors = [
            NewTensor(t.name, types[t.name], t.shape, partial(make, t))
            if t.name in types
            else _as_it_is(dense, t)
            for t in dense.layout.tensors
        ]
        write_gguf(twin, dense, tensors, replace={"general.file_type": None})
    context.progress(0.4, "measuring speed, alone on this machine")
    files = {"dense": twin, "sparse": context.files["variant"]}
    figures = {
        name: {
            "bytes": path.stat().st_size,
            "compressed_bytes": compressed_bytes(path),
            "zeros_ratio": stored_zeros_ratio(path),
        }
        for name, path in files.items()
    }
    benches: dict[str, list[Any]] = {name: [] for name in files}
    for _ in range(int(context.params["repeats"])):  # by turns: a slow minute slows both
        for name, path in files.items():
            benches[name].append(asyncio.run(_bench(path, context.params)))
    for name, runs in benches.items():
        figures[name] |= {
            "decode_tps": statistics.median(run.decode_tps for run in runs),
            "prefill_tps": statistics.median(run.prefill_tps for run in runs),
            "rss_bytes": statistics.median(run.peak_rss_bytes for run in runs),
        }
    twin.unlink()
    ratios = {
        name: figures["sparse"][name] / figures["dense"][name]
        for name in ("bytes", "compressed_bytes", "decode_tps", "prefill_tps", "rss_bytes")
    }
    return {
        "runtime": "llama.cpp",
        **figures,
        "ratios": ratios,
        "gains": gains(ratios),
        "profile": context.params["profile"],
        "others": list(context.params["others"]),
        "verdict": verdict("llama.cpp", ratios, figures["sparse"]["zeros_ratio"])
        + scope(context.params["profile"], context.params["others"]),
    }


def scope(profile: str, others: Sequence[str]) -> str:
    """Whose variant a verdict is about."""
    rest = f"; those for {', '.join(others)} have other tensor types and were not measured" if others else ""
    return f". Measured on the variant for {profile}{rest}"


def gains(ratios: Mapping[str, float]) -> list[str]:
    """Which measured figures are better by at least 5 %."""
    faster = [name for name in ("decode_tps", "prefill_tps") if ratios[name] >= 1 + WORTH]
    return faster + [name for name in ("rss_bytes", "bytes", "compressed_bytes") if ratios[name] <= 1 - WORTH]


def verdict(runtime: str, ratios: Mapping[str, float], zeros_ratio: float) -> str:
    """What a person should know, in a sentence or two."""
    found = gains(ratios)
    figures = (
        f"decode × {ratios['decode_tps']:.2f}, prefill × {ratios['prefill_tps']:.2f}, memory × {ratios['rss_bytes']:.2f}, "
        f"file × {ratios['bytes']:.2f}, file compressed by zlib × {ratios['compressed_bytes']:.2f}"
    )
    stored = f"{zeros_ratio:.0%} of the stored sparse tensors are zero"
    if not found:
        return f"no gain on {runtime}: {figures} ({stored}). Leave the step out: quantise lower, or prune width or depth"
    if found == ["compressed_bytes"]:
        return (
            f"no gain on {runtime} in speed, memory or file: {figures} ({stored}). Only a compressed download is smaller; "
            "compare it with a lower budget for the dense model before paying for it in quality"
        )
    return f"gain on {runtime} in {', '.join(found)}: {figures} ({stored})"


def compressed_bytes(path: Path) -> int:
    """Size of a file compressed by zlib."""
    packer, size = zlib.compressobj(ZLIB_LEVEL), 0
    with path.open("rb") as source:
        while block := source.read(_BLOCK_BYTES):
            size += len(packer.compress(block))
    return size + len(packer.flush())


def stored_zeros_ratio(path: Path) -> float:
    """Share of exact zeros in the tensors that can be sparse, as the engine reads them: some types cannot store a zero."""
    zeros = total = 0
    with open_gguf(path) as model:
        for tensor in model.layout.tensors:
            if _SPARSE.match(tensor.name):
                rows = model.rows(tensor)
                zeros, total = zeros + int((rows == 0).sum()), total + rows.size
    return zeros / total if total else 0.0


def _as_it_is(model: GgufFile, tensor: Tensor) -> NewTensor:
    return NewTensor(tensor.name, tensor.type_name, tensor.shape, lambda: bytes(model.blob(tensor)))


async def _bench(path: Path, params: Mapping[str, Any]) -> Any:
    serving = Serving(**params["serving"])
    spec = EngineSpec(
        runtime="llama.cpp",
        model_path=path,
        context_tokens=serving.context_tokens,
        slots=serving.parallel,
        kv_cache=serving.kv_cache,
        batch_tokens=max(serving.micro_batch_tokens, 64),
        ubatch_tokens=serving.micro_batch_tokens,
    )
    return await bench_model(
        spec, prompt_tokens=params["prompt_tokens"], decode_tokens=params["decode_tokens"], repeats=1
    )
