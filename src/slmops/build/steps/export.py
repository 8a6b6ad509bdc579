"""Exporting: the unquantised reference as a Hugging Face directory, and that as another runtime's files.

Exit code 0 of an exporter proves nothing, so this step alone makes no variant: :mod:`slmops.build.steps.parity` loads what
it left, and what is measured afterwards names that step among its inputs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slmops.artifact.chunkmap import encode_chunk_map, make_chunk_map
from slmops.build.content_cuts import cut_points
from slmops.build.export.exported import LOG, ROLE, digest_of_files, interpreter_of
from slmops.build.export.formats import MODEL_FACTS, TOKENIZER_FILES, format_of, refuse_options
from slmops.build.export.tool_process import ToolProcess, memory_limit
from slmops.build.files import link_or_copy, sha256_of_file
from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.hf.write import write_directory
from slmops.core.errors import BudgetError, BuildError

#: the script, and what the format asks of it, are in the params (export_plan): a change of another runtime exports nothing again
USES = (
    "slmops.artifact.chunkmap",
    "slmops.artifact.fastcdc",
    "slmops.build.content_cuts",
    "slmops.build.export.exported",
    "slmops.build.export.tool_process",
    "slmops.build.gguf_file",
    "slmops.build.hf.tokenizer",
    "slmops.build.hf.write",
)
EXPORT_LIMIT_S, SLOW_EXPORT_LIMIT_S = 1800.0, 4 * 3600.0
CHUNK_MAP = "chunk-map-"
CALIBRATION = "calibration"


def source(context: StepContext) -> dict[str, Any]:
    """Write the reference as a Hugging Face directory. Files in: ``model`` (GGUF, unquantised); out: the directory's files.

    Value: ``model``: what ``slmops-model.json`` will say; ``shape``: what decides memory and speed.

    Raises:
        BaseModelError: an architecture or a tokenizer that cannot be exported; see :mod:`slmops.build.hf.write`.
    """
    with open_gguf(context.files["model"]) as model:
        facts = write_directory(
            model,
            context.out,
            progress=lambda ratio: context.progress(ratio, "writing weights for exporters"),
        )
        shape = model.layout.shape()
    return {"model": facts.document("source"), "shape": asdict(shape)}


def export(context: StepContext) -> dict[str, Any]:
    """Run an exporter.

    Files in: those of :func:`source` by name, and ``calibration`` (lists of token ids) where the format asks for it; out: the
    variant's files (``variant--...``), a chunk map of each (``chunk-map-...``), and the exporter's log. Values in: ``source``.
    Params: ``runtime``, ``precision``, ``toolchain`` (its digest), ``context_tokens`` (where the format fixes it),
    ``artifact_bytes`` (the budget, or None), ``options`` (the recipe's, for the exporter).
    Value: ``files`` with size, digest and format of each; ``bytes``; ``bits_per_weight``; ``sha256`` of all files together.

    Raises:
        BudgetError: the files are larger than the budget.
        BuildError, NoMemoryError, DeadlineError, NetworkError: the exporter or its toolchain.
    """
    params = context.params
    form = format_of(params["runtime"], params["precision"])
    told = dict(params.get("options") or {})
    refuse_options(form.runtime, told)
    options = dict(form.options)
    if told:
        options["extra_options"] = {**options.get("extra_options", {}), **told}
    model = context.values["source"]["model"]
    context_tokens = min(int(params["context_tokens"]), model["context_tokens"])
    with tempfile.TemporaryDirectory(prefix=".export-", dir=context.out) as scratch:
        given, made = Path(scratch) / "source", Path(scratch) / "out"
        given.mkdir()
        made.mkdir()
        for name, path in context.files.items():
            if name != CALIBRATION:
                link_or_copy(path, given / name)
        calibration = context.files.get(CALIBRATION)
        request = {
            "op": "export",
            "source": str(given),
            "out": str(made),
            "checkpoints": str(context.checkpoints) if context.checkpoints else None,
            "runtime": form.runtime,
            "precision": form.precision,
            "options": options,
            "context_tokens": context_tokens,
            "model": model,
            "model_name": form.model,
            "keep_from_source": list(TOKENIZER_FILES),
            "calibration": json.loads(calibration.read_text(encoding="utf-8")) if calibration else None,
        }
        with ToolProcess(
            interpreter_of(form, context),
            form.tool,
            request,
            context.out / LOG,
            memory_bytes=memory_limit(),
            limit_s=SLOW_EXPORT_LIMIT_S if form.slow else EXPORT_LIMIT_S,
        ) as tool:
            tool.result(context.progress)
            tail = tool.tail()
        if not (made / form.model).is_file():
            raise BuildError(
                f"{form.runtime} {form.precision}: the exporter ended well and left no {form.model}",
                hint=f"the log's end: {tail[-400:]}",
                log=tail,
            )
        for name in TOKENIZER_FILES:
            if (given / name).is_file() and not (made / name).is_file():
                shutil.copyfile(given / name, made / name)
        document = {**model, "precision": form.precision, "context_tokens": context_tokens}
        (made / MODEL_FACTS).write_text(
            json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
        for path in sorted(made.iterdir()):
            if path.is_file():
                path.rename(context.out / f"{ROLE}{path.name}")
    files = _described(context.out, form.model, form.kind)
    total = sum(file["bytes"] for file in files.values())
    budget = params["artifact_bytes"]
    if budget is not None and total > budget:
        raise BudgetError(
            f"{form.runtime} {form.precision}: its files have {total} bytes together, the budget is {budget}",
            hint="raise the target's artifact_bytes, or choose a smaller precision",
            artifact_bytes=total,
            budget_bytes=budget,
        )
    return {
        "files": files,
        "bytes": total,
        "budget_bytes": budget,
        "model": document,
        "shape": {**context.values["source"]["shape"], "weights_bytes": _weight_bytes(files)},
        "bits_per_weight": 8 * _weight_bytes(files) / model["shape"]["parameters"],
        "sha256": digest_of_files({name: file["sha256"] for name, file in files.items()}),
        "toolchain": params["toolchain"],
        "options": options,
    }


def _described(out: Path, model: str, kind: str) -> dict[str, dict[str, Any]]:
    """Size, digest and format of each file of the variant; its chunk map is written beside it."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob(f"{ROLE}*")):
        name = path.name.removeprefix(ROLE)
        files[name] = {
            "bytes": path.stat().st_size,
            "sha256": sha256_of_file(path),
            "format": kind if name == model else path.suffix.lstrip(".") or "bytes",
        }
    for name, file in files.items():
        content = (out / f"{ROLE}{name}").read_bytes()
        chunk_map = make_chunk_map(content, file["format"], name, cut=cut_points)
        (out / f"{CHUNK_MAP}{name}.json").write_bytes(encode_chunk_map(chunk_map))
    return files


def _weight_bytes(files: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of the files that hold weights: all but tokenizer and documents."""
    return sum(
        file["bytes"]
        for name, file in files.items()
        if name not in TOKENIZER_FILES and not name.endswith(".json")
    )
