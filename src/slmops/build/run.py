"""Running a build: recipe -> plan -> steps -> build directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops.artifact.build_index import (
    Build,
    encode_index,
)
from slmops.build.assemble import assemble
from slmops.build.cache import Cache
from slmops.build.directory import place
from slmops.build.events import Progress
from slmops.build.overlap import check_never_seen
from slmops.build.plan import make_plan
from slmops.build.recipe_files import read_recipe, with_speed_table
from slmops.build.runner import run_steps
from slmops.core.evidence.gates import Finding, Verdict, combine
from slmops.protocol.documents.recipe_gates import Evaluation

SCHEMA = 1
UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build did.

    Attributes:
        folder: the build directory; ``build``: its index.
        changed: False when the directory already held exactly this build.
        steps_run: steps that were run; ``steps_cached``: steps whose results were known.
        seconds: wall time.
        verdict: the worst verdict of all gates: pass, fail, inconclusive or error.
    """

    folder: Path
    build: Build
    changed: bool
    steps_run: int
    steps_cached: int
    seconds: float
    verdict: str


def run_build(  # noqa: PLR0913 - each is an option of the command line
    recipe_path: Path,
    out_dir: Path,
    *,
    cache_dir: Path | None = None,
    targets: Sequence[str] | None = None,
    fast: bool = False,
    evaluation: Evaluation | None = None,
    progress: Progress = lambda event: None,
    workers: int = 2,
    speed_table: Path | None = None,
    engine: str = "local",
) -> BuildResult:
    """Build a recipe's variants, measure them, judge them, and write the build directory.

    Failing gates do not fail the build; they are in its evidence, and no release is made of it without a waiver.

    Args:
        recipe_path: YAML file with one ``kind: Recipe`` (and maybe ``kind: DeviceProfile`` documents).
        out_dir: build directory to write; replaced when it holds another build.
        cache_dir: step cache; None takes ``$SLMOPS_CACHE``, else ``.slmops-cache`` in the current folder.
        targets: profiles to build; None for all of the recipe's.
        fast: measure less (:meth:`Evaluation.fast`).
        evaluation: replaces the recipe's.
        progress: called from this thread with every event.
        workers: step processes at once; 0 runs all steps in this process.
        speed_table: how fast each type is on another machine, instead of the recipe's ``search.speed``.
        engine: ``local``, or ``ray``: steps that are neither light nor measure time run on a Ray cluster.

    Raises:
        SlmopsError: see the package's docstring; steps that ended well stay cached.
    """
    began_s = time.monotonic()
    read = read_recipe(recipe_path, cache_dir)
    if speed_table is not None:
        read = with_speed_table(read, speed_table)
    asked = evaluation or read.recipe.evaluation
    allowed = read.recipe.task.allow_overlap
    seen = check_never_seen(read.sources, allowed.reason if allowed else None)
    plan = make_plan(
        read, only=tuple(targets) if targets is not None else None, evaluation=asked.fast() if fast else asked
    )
    cache = Cache(cache_dir)
    finished = run_steps(plan.steps, cache, progress=progress, workers=workers, engine=engine)
    build, fill = assemble(read, plan, finished.results, cache, seen=seen, fast=fast)
    changed = place(out_dir, fill, encode_index(build))
    findings = [
        Finding(f.gate, Verdict(f.verdict), f.reason, f.needed) for v in build.variants for f in v.findings
    ]
    ran = len(finished.ran)
    return BuildResult(
        out_dir,
        build,
        changed,
        ran,
        len(plan.steps) - ran,
        time.monotonic() - began_s,
        combine(findings).value,
    )
