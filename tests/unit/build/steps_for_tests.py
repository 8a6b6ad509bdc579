"""Steps for the runner's tests; a step's process imports them by name."""

from __future__ import annotations

import os
import signal
from typing import Any

from slmops.build.graph import StepContext
from slmops.core.errors import BudgetError


def write(context: StepContext) -> dict[str, Any]:
    """Write what the inputs say, counting runs in a file outside."""
    if "log" in context.params:
        with open(context.params["log"], "a", encoding="utf-8") as log:
            log.write(f"{context.params['text']}\n")
    before = "".join(context.files[name].read_text() for name in sorted(context.files))
    (context.out / "out.txt").write_text(before + context.params["text"])
    context.progress(0.5, "half")
    print("this is log, not an event")
    return {"length": len(before) + len(context.params["text"]), "seen": sorted(context.values)}


def refuse(context: StepContext) -> None:
    """A named error, after leaving a file behind."""
    (context.out / "half").write_text("half")
    raise BudgetError("too small", hint="take more", smallest_bytes=5)


def crash(context: StepContext) -> None:
    """Die as native code does."""
    (context.out / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGSEGV)


def break_down(context: StepContext) -> None:
    """An error that nobody planned."""
    raise ZeroDivisionError("by zero")


def lose_the_disk(context: StepContext) -> None:
    """What a full disk looks like."""
    raise OSError(28, "No space left on device")


def train(context: StepContext) -> dict[str, Any]:
    """Three rounds, one a run: dies after each but the last, and goes on from its checkpoint."""
    assert context.checkpoints is not None
    context.checkpoints.mkdir(parents=True, exist_ok=True)
    state = context.checkpoints / "state"
    done = int(state.read_text()) + 1 if state.exists() else 1
    state.write_text(str(done))
    if done < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"rounds": done}
