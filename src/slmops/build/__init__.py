"""From a recipe to a build directory: variants, evidence, golden pack, provenance. Needs the extra ``build``.

Owns: the step graph and its cache, the steps (fetch, merge, permute, calibrate, search, quantise, evaluate, golden
pack), the build directory. Does not own: signing and publishing (:mod:`slmops.release`), engines (:mod:`slmops.runtimes`).

For the command line::

    from slmops.build import run_build, load_build, describe, diff

    result = run_build(
        Path("recipe.yaml"), Path("build/home-intents"),
        cache_dir=None,            # default: $SLMOPS_CACHE, else .slmops-cache in the current folder
        targets=None,              # or profile names, to build only these
        fast=False,                # True: the recipe's evaluation cut down for a quick look (recorded in the evidence)
        progress=print_event,      # Callable[[StepEvent], None]; called from the calling thread only
        workers=2,                 # step processes at once; 0 runs every step in this process
    )
    result.changed                 # False: the directory already held exactly this build; nothing was written
    result.steps_run, result.steps_cached, result.seconds
    result.verdict                 # the worst gate verdict; a build succeeds with failing gates, a release does not

    build = load_build(Path("build/home-intents"))     # Build: build.json, checked
    describe(build)                # dict of plain JSON values for `build show`: "variants", "gates", "scores", "steps"
    diff(old, new)                 # dict for `build diff`: what differs, metric by metric and variant by variant

A :class:`StepEvent` has ``step``, ``state`` (``started`` · ``cached`` · ``progress`` · ``done`` · ``failed``), ``ratio``
(0..1 or None), ``seconds`` (since the step started), ``note`` and ``done``/``total`` steps of the whole run.

Errors: DocumentError (recipe), BaseModelError and DigestError (base), NetworkError (fetch), BudgetError (no choice of types
fits), NoSpaceError (disk full), BuildError (anything else that a step met). Nothing half-written stays, failures are
never cached, and the steps that ended well are not run again.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmops.artifact.build_index import Build
    from slmops.build.directory import describe, diff, load_build
    from slmops.build.events import Progress, StepEvent
    from slmops.build.run import BuildResult, run_build

__all__ = ["Build", "BuildResult", "Progress", "StepEvent", "describe", "diff", "load_build", "run_build"]

_HOMES = {
    "Build": "slmops.artifact.build_index",
    "BuildResult": "run",
    "Progress": "events",
    "StepEvent": "events",
    "describe": "directory",
    "diff": "directory",
    "load_build": "directory",
    "run_build": "run",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a step's process needs its step, not the YAML reader."""
    if name not in _HOMES:
        raise AttributeError(name)
    home = _HOMES[name]
    return getattr(importlib.import_module(home if "." in home else f"slmops.build.{home}"), name)
