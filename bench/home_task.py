"""The example's task, for benches: its items, and models that were taught it by the example's adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from slmops.build.cache import Cache
from slmops.build.files import sha256_of_file
from slmops.build.graph import Output, SourceFile, Step
from slmops.build.runner import run_steps

EXAMPLE = Path(__file__).parents[1] / "examples" / "home-intents"
TEXT = "render text"
ADAPTER = EXAMPLE / "adapter" / "home-intents-r8.gguf"


@dataclass(frozen=True)
class Taught:
    """A model that can do the task.

    Attributes:
        model: F16, with the adapter merged.
        calibration: conversations as token ids, none of them an evaluation item.
        steps: that made these; ``TEXT`` is the one whose value the questions need.
        items: the evaluation items; ``schema``: of their answers.
    """

    model: SourceFile
    calibration: list[list[int]]
    steps: tuple[Step, ...]
    items: SourceFile
    schema: SourceFile


def source(path: Path) -> SourceFile:
    """A file by its digest."""
    return SourceFile(path.absolute(), sha256_of_file(path))


def taught(model: Path, folder: Path, cache: Cache, *, calibration_tokens: int, items: int) -> Taught:
    """Merge the adapter into a SmolLM2 and render the task's text.

    Args:
        model: F16.
        folder: for the task's files, made when they are not there.
        cache: of step results.
        calibration_tokens: of conversations.
        items: of the evaluation set that will be asked.
    """
    made = folder / "home-intents"
    if not (made / "eval.jsonl").is_file():
        command = [sys.executable, str(EXAMPLE / "make_dataset.py"), "--out", str(made)]
        subprocess.run([*command, "--train-items", "2000"], check=True, stdout=subprocess.DEVNULL)
    files = {name: source(made / name) for name in ("eval.jsonl", "calibration.txt", "answer.schema.json")}
    merged = Output("merge", "model.gguf")
    text = {
        "model": merged,
        "eval": files["eval.jsonl"],
        "calibration": files["calibration.txt"],
        "system_prompt": source(EXAMPLE / "prompts" / "home.txt"),
    }
    counts = {
        "calibration_tokens": calibration_tokens,
        "text_tokens": 64,  # the bench judges on another text
        "task_items": items,
        "seed": 7,
    }
    steps = [
        Step(
            "merge",
            "slmops.build.steps.weights:merge",
            {"model": source(model), "adapter": source(ADAPTER)},
            {"scale": 1.0},
        ),
        Step(TEXT, "slmops.build.steps.text:render", text, counts),
    ]
    results = run_steps(steps, cache, progress=lambda event: None, workers=1).results
    known = cache.path(results[TEXT].files["calibration.json"].sha256)
    return Taught(
        source(cache.path(results["merge"].files["model.gguf"].sha256)),
        json.loads(known.read_text(encoding="utf-8")),
        tuple(steps),
        files["eval.jsonl"],
        files["answer.schema.json"],
    )
