"""Narrower feed-forward layers and fewer blocks, as steps. No training here: recovery is a step of its own.

**Width.** Neurons go by what their absence costs after the others have made up for it (optimal brain surgeon, for whole
columns): with H the second moment of the activations h that flow into ``ffn_down``, removing neuron j costs
``|w_j|² / (H⁻¹)_jj`` of squared output, and the best make-up is ``W - w_j (H⁻¹)_j / (H⁻¹)_jj``. Both follow from activations; the
size of the weights alone says nothing (a weight-magnitude criterion took this small model's perplexity from 34 to 2.3 million).

**Depth.** One block after another goes, each time the one whose absence moves the model's predictions least, by measured KL
divergence on calibration text. All remaining blocks are tried on a part of the text, the best of them on all of it.

Source: Kurtic et al. 2023, arXiv:2302.04089 (ZipLM), section 3; Hassibi and Stork 1993 (optimal brain surgeon).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.build.gguf_file import GgufFile, open_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.probe import Probe, probe_sequences
from slmops.build.structure import Structure, check_depth, check_width, cut
from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp.activations import collect_moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

USES = (
    "slmops.artifact.gguf_layout",
    "slmops.build.gguf_file",
    "slmops.build.steps.divergence",
    "slmops.build.steps.probe",
    "slmops.build.structure",
    "slmops.build.vocabulary",
    "slmops.runtimes.llama_cpp.activations",
    "slmops.runtimes.llama_cpp.imatrix",
    "slmops.runtimes.llama_cpp.logits",
    "slmops.runtimes.llama_cpp.quantise",
)
WINDOW_TOKENS = 256
#: neurons that go between two looks at what the rest costs
AT_ONCE = 32
#: shares of H's diagonal that are added to it, so that the make-up is of the layer and not of the sample; and of its mean, so
#: that H is invertible where neurons never fire
DAMPINGS, LEAST_DAMPING = (0.03, 0.3), 1e-8
#: one window in so many is not learned from: it chooses the damping
WATCHED_SHARE = 8
#: second moments held in memory at once
MOMENTS_BYTES = 1 << 30
#: one in so many blocks comes into the second round
FINAL_SHARE = 4
LEAST_FINAL = 4
#: what a block adds to its input; zero here is a block that is not there
OUTPUTS = ("attn_output.weight", "attn_output.bias", "ffn_down.weight", "ffn_down.bias")


def width(context: StepContext) -> dict[str, Any]:
    """Narrow every feed-forward layer to ``keep_ffn_width`` neurons.

    Files in: ``model`` (F16), ``text`` (token ids), maybe ``watch`` (others); out: ``model.gguf``, ``structure.json``. Params:
    ``keep_ffn_width``, ``moment_tokens``, ``probe_tokens``. Value: widths, ``lost_ratio`` (squared output that cannot be made
    up, mean and worst block), ``kld`` from the model before, on what is watched.
    """
    wanted = int(context.params["keep_ffn_width"])
    windows = calibration_windows(context.files["text"], int(context.params["moment_tokens"]))
    watched = windows[::WATCHED_SHARE] if len(windows) >= WATCHED_SHARE else []
    learned = [window for index, window in enumerate(windows) if not watched or index % WATCHED_SHARE]
    target = context.out / "model.gguf"
    neurons: dict[int, tuple[int, ...]] = {}
    changed: dict[str, NDArray[np.float32]] = {}
    lost: dict[int, float] = {}
    with open_gguf(context.files["model"]) as model:
        before = check_width(model, wanted)
        layers = list(range(model.layout.number("block_count")))
        at_once = max(1, MOMENTS_BYTES // (8 * before * before))
        for start in range(0, len(layers), at_once):
            names = {layer: f"blk.{layer}.ffn_down.weight" for layer in layers[start : start + at_once]}
            context.progress(0.05 + 0.75 * start / len(layers), "collecting activations")
            moments = collect_moments(context.files["model"], learned, list(names.values()))
            others = collect_moments(context.files["model"], watched, list(names.values())) if watched else {}
            for layer, name in names.items():
                cut_layer = narrow(_rows(model, name), moments.pop(name), wanted, others.pop(name, None))
                neurons[layer], changed[name], lost[layer] = cut_layer
                context.progress(
                    0.3 + 0.5 * (layer + 1) / len(layers), f"block {layer}: {lost[layer]:.2%} lost"
                )
        structure = Structure(neurons=neurons)
        cut(target, model, structure, changed=changed)
    (context.out / "structure.json").write_bytes(structure.encode())
    worst = max(lost, key=lambda layer: lost[layer])
    return {
        "ffn_before": before,
        "ffn": wanted,
        "lost_ratio": sum(lost.values()) / len(lost),
        "worst_block": worst,
        "worst_lost_ratio": lost[worst],
        "bytes": target.stat().st_size,
        **_measured(context),
    }


def narrow(
    rows: NDArray[np.float32],
    moments: NDArray[np.float32],
    keep: int,
    watched: NDArray[np.float32] | None = None,
) -> tuple[tuple[int, ...], NDArray[np.float32], float]:
    """Choose the neurons of one feed-forward layer, and make up for the others.

    Args:
        rows: of ``ffn_down``, shape (hidden, ffn).
        moments: sum of h hᵀ, shape (ffn, ffn).
        keep: neurons to keep.
        watched: the same of other text, which chooses how much is made up for; None: the larger damping.

    Returns: the kept neurons, ascending; new rows, shape (hidden, keep); the share of the layer's squared output that is lost, on
    the watched text where there is some.
    """
    judge = (moments if watched is None else watched).astype(np.float64)
    found = []
    for damping in DAMPINGS if watched is not None else DAMPINGS[-1:]:
        alive, weights = _removed(rows.astype(np.float64), moments.astype(np.float64), keep, damping)
        found.append((_lost_ratio(rows.astype(np.float64), alive, weights, judge), alive, weights))
    lost, alive, weights = min(found, key=lambda result: result[0])
    return tuple(int(i) for i in alive), weights.astype(np.float32), lost


def _removed(
    weights: NDArray[np.float64], second: NDArray[np.float64], keep: int, damping: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Remove what is missed least, a few at a time; give who is left, and their columns."""
    own = np.diag(second)
    inverse = np.linalg.inv(second + np.diag(damping * own + (LEAST_DAMPING * own.mean() or 1.0)))
    alive = np.arange(len(second))
    while len(alive) > keep:
        count = min(AT_ONCE, len(alive) - keep)
        costs = (weights**2).sum(axis=0) / np.diag(inverse)
        order = np.argsort(costs, kind="stable")
        out, stay = np.sort(order[:count]), np.sort(order[count:])
        make_up = np.linalg.solve(
            inverse[np.ix_(out, out)], inverse[np.ix_(out, stay)]
        )  # Shape: (count, stay)
        weights = weights[:, stay] - weights[:, out] @ make_up
        inverse = inverse[np.ix_(stay, stay)] - inverse[np.ix_(stay, out)] @ make_up
        alive = alive[stay]
    return alive, weights


def _lost_ratio(
    whole: NDArray[np.float64],
    alive: NDArray[np.int64],
    weights: NDArray[np.float64],
    second: NDArray[np.float64],
) -> float:
    """Share of the squared output that is lost."""
    difference = whole.copy()
    difference[:, alive] -= weights
    squared = float(((whole @ second) * whole).sum())
    return float(((difference @ second) * difference).sum()) / squared if squared > 0 else 0.0


def depth(context: StepContext) -> dict[str, Any]:
    """Drop blocks, one after another, each time the one that is missed least.

    Files in: ``model`` (F16), ``text`` (token ids); out: ``model.gguf``, ``structure.json``. Params: ``drop_layers``,
    ``probe_tokens``, ``screen_tokens``. Value: ``dropped`` (the model's own numbers, in order) each with the ``kld`` from the
    whole model that was measured when it went, and how many tries that took.
    """
    count = int(context.params["drop_layers"])
    probe = Probe(
        context.files["model"], probe_sequences(context.files["text"], int(context.params["probe_tokens"]))
    )
    screen = int(context.params["screen_tokens"])
    scratch = context.out / ".scratch.gguf"
    shutil.copyfile(context.files["model"], scratch)
    scratch.chmod(0o600)
    dropped: list[dict[str, Any]] = []
    tries = 0
    with open_gguf(context.files["model"]) as model, scratch.open("r+b", buffering=0) as sink:
        layers = check_depth(model, count)
        alive = list(range(layers))

        def measure(layer: int, tokens: int | None) -> float:
            nonlocal tries
            tries += 1
            _silence(sink, model, layer)
            value = probe.divergence(scratch, tokens)
            _restore(sink, model, layer)
            context.progress(0.9 * len(dropped) / count, f"without block {layer}: KL divergence {value:.4f}")
            return value

        for _ in range(count):
            screened = {layer: measure(layer, screen) for layer in alive}
            finalists = sorted(alive, key=lambda layer: (screened[layer], layer))
            finalists = finalists[: max(LEAST_FINAL, len(alive) // FINAL_SHARE)]
            measured = {layer: measure(layer, None) for layer in finalists}
            best = min(measured, key=lambda layer: (measured[layer], layer))
            _silence(sink, model, best)
            alive.remove(best)
            dropped.append({"layer": best, "kld": measured[best]})
        structure = Structure(layers=tuple(alive))
        cut(context.out / "model.gguf", model, structure)
    scratch.unlink()
    (context.out / "structure.json").write_bytes(structure.encode())
    return {
        "layers_before": layers,
        "layers": len(alive),
        "dropped": dropped,
        "tries": tries,
        "probe_tokens": probe.tokens,
        "kld": probe.divergence(context.out / "model.gguf"),
        "bytes": (context.out / "model.gguf").stat().st_size,
    }


def calibration_windows(text: Path, tokens: int) -> list[list[int]]:
    """The first calibration tokens in windows of one length; a short rest is left out unless there is nothing else.

    Raises:
        BuildError: there is no text.
    """
    sequences = json.loads(text.read_text(encoding="utf-8"))
    flat = [token for sequence in sequences for token in sequence][:tokens]
    size = min(WINDOW_TOKENS, len(flat))
    if size < 2:
        raise BuildError(
            "the calibration text has no tokens", hint="give some 100 sentences in task.calibration"
        )
    return [flat[at : at + size] for at in range(0, len(flat) - size + 1, size)]


def _measured(context: StepContext) -> dict[str, Any]:
    """Divergence of the new model from the one before; nothing when no tokens are given for it."""
    tokens = int(context.params["probe_tokens"])
    if not tokens:
        return {}
    context.progress(0.9, "measuring KL divergence")
    text = context.files.get("watch", context.files["text"])
    probe = Probe(context.files["model"], probe_sequences(text, tokens))
    return {"kld": probe.divergence(context.out / "model.gguf"), "probe_tokens": probe.tokens}


def _rows(model: GgufFile, name: str) -> NDArray[np.float32]:
    tensor = model.tensor(name)
    assert tensor is not None  # check_width saw it
    return model.rows(tensor)


def _silence(sink: Any, model: GgufFile, layer: int) -> None:
    """Make a block add nothing to its input: the same predictions as without it."""
    for name in OUTPUTS:
        tensor = model.tensor(f"blk.{layer}.{name}")
        if tensor is not None:
            _write(sink, tensor.offset, b"\0" * tensor.size_bytes)


def _restore(sink: Any, model: GgufFile, layer: int) -> None:
    for name in OUTPUTS:
        tensor = model.tensor(f"blk.{layer}.{name}")
        if tensor is not None:
            _write(sink, tensor.offset, model.blob(tensor))


def _write(sink: Any, offset: int, blob: bytes | memoryview) -> None:
    sink.seek(offset)
    rest = memoryview(blob)
    while rest:  # unbuffered: the reader's mapping sees it at once
        rest = rest[sink.write(rest) :]
