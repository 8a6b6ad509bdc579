"""What a build calls: recovery as steps of its graph.

Importing this module imports no torch, so that a build can name these steps, and find their results in its cache, where torch
is not installed. A step's function takes the build's step context (files, values, params, an empty folder, progress, and maybe a
folder for checkpoints that outlives a kill).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from slmops.core.errors import BuildError
from slmops.train.step_context import Context

USES = (
    "slmops.artifact.gguf_layout",
    "slmops.train.distil",
    "slmops.train.llama",
    "slmops.train.lora",
    "slmops.train.reconstruct",
    "slmops.train.students",
)


def reconstruct(context: Context) -> dict[str, Any]:
    """Fit each block of a cut model to the dense model's blocks.

    Files in: ``model`` (F16, cut), ``teacher`` (F16, dense, the same vocabulary), ``text``, ``watch``, ``structure-0``...
    (the cuts, in order); out: ``model.gguf``. Params: ``tokens``. Value: see ``slmops.train.reconstruct.reconstruct``.
    """
    _need_torch()
    from slmops.train.llama import load_llama  # noqa: PLC0415 - torch only where it is used
    from slmops.train.reconstruct import reconstruct as run  # noqa: PLC0415
    from slmops.train.reconstruct import trained  # noqa: PLC0415
    from slmops.train.students import write_weights  # noqa: PLC0415

    context.progress(0.0, "loading student and dense model")
    student, dense = load_llama(context.files["model"]), load_llama(context.files["teacher"])
    kept = list(range(dense.shape.layers))
    names = sorted((n for n in context.files if n.startswith("structure-")), key=lambda n: int(n[10:]))
    for name in names:
        layers = json.loads(context.files[name].read_bytes())["layers"]
        kept = kept if layers is None else [kept[layer] for layer in layers]
    value = run(
        student,
        dense,
        kept,
        _text(context),
        _watched(context),
        checkpoint=_checkpoint(context, "reconstruct.pt"),
        report=context.progress,
    )
    write_weights(context.files["model"], context.out / "model.gguf", trained(student))
    return value


def distil(context: Context) -> dict[str, Any]:
    """Train a model towards a teacher's kept distributions.

    Files in: ``model`` (F16), ``text``, ``watch``, ``ids``, ``logprobs``; out: ``model.gguf``. Params: ``method``, ``rank``,
    ``epochs``, ``learning_rate``, ``seed``, ``keep_zeros``, ``tokens``. Value: see ``slmops.train.distil.distil``.
    """
    _need_torch()
    import numpy as np  # noqa: PLC0415 - with torch, only where it is used

    from slmops.train.distil import Distillation, Teacher  # noqa: PLC0415
    from slmops.train.distil import distil as run  # noqa: PLC0415
    from slmops.train.llama import load_llama  # noqa: PLC0415
    from slmops.train.students import write_weights  # noqa: PLC0415

    params = context.params
    context.progress(0.0, "loading the student")
    settings = Distillation(
        method=str(params["method"]),
        rank=int(params["rank"]),
        epochs=int(params["epochs"]),
        learning_rate=float(params["learning_rate"]),
        seed=int(params["seed"]),
        keep_zeros=bool(params["keep_zeros"]),
    )
    weights, value = run(
        load_llama(context.files["model"]),
        Teacher(np.load(context.files["ids"]), np.load(context.files["logprobs"])),
        _text(context),
        _watched(context),
        settings,
        checkpoint=_checkpoint(context, "distil.pt"),
        report=context.progress,
    )
    write_weights(context.files["model"], context.out / "model.gguf", weights)
    return value


def _text(context: Context) -> list[list[int]]:
    """The first sequences that hold so many tokens as the step may learn from."""
    wanted = int(context.params["tokens"])
    chosen: list[list[int]] = []
    for sequence in json.loads(context.files["text"].read_text(encoding="utf-8")):
        if sum(map(len, chosen)) >= wanted:
            break
        chosen.append(sequence)
    return chosen


def _watched(context: Context) -> list[list[int]]:
    watched: list[list[int]] = json.loads(context.files["watch"].read_text(encoding="utf-8"))
    return watched


def _checkpoint(context: Context, name: str) -> Path | None:
    return context.checkpoints / name if context.checkpoints is not None else None


def _need_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise BuildError(
            "training needs torch, which is not installed here",
            hint="pip install 'slmops[train]', or leave recover and distil out of the recipe",
        )
