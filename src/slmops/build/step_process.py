"""One step in a process of its own: ``python -m slmops.build.step_process``, configuration on stdin, events on stdout.

A process a step keeps memory and native libraries apart, lets two steps run at once, and makes a crash of the engine's
native code an error of one step. The process dies with its parent: nothing runs on after a ``kill -9`` of the build.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import IO, Any

from slmops.build.files import no_space
from slmops.build.graph import StepContext, resolve
from slmops.core.errors import SlmopsError

EXIT_ORPHANED = 4


def main() -> int:
    """Run the step that stdin describes."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as events:
        os.dup2(2, 1)  # whatever a library prints is log, not an event
        config: dict[str, Any] = json.loads(_first_line())
        threading.Thread(target=_watch_parent, daemon=True, name="parent-watch").start()
        out = Path(config["out"])

        def progress(ratio: float | None, note: str) -> None:
            _send(events, {"ratio": ratio, "note": note})

        context = StepContext(
            {name: Path(path) for name, path in config["files"].items()},
            config["values"],
            config["params"],
            out,
            progress,
            Path(config["memo"]) if config.get("memo") else None,
            Path(config["checkpoints"]),
        )
        try:
            value = resolve(config["run"])(context)
        except SlmopsError as error:
            _send(
                events,
                {
                    "error": {
                        "code": error.code,
                        "message": error.message,
                        "hint": error.hint,
                        "fields": error.fields,
                    }
                },
            )
        except OSError as error:
            full = no_space(out, error)
            _send(
                events,
                {
                    "os_error": error.errno,
                    "error": {
                        "code": full.code,
                        "message": full.message,
                        "hint": full.hint,
                        "fields": full.fields,
                    },
                },
            )
            raise
        else:
            _send(events, {"value": value})
    return 0


def _first_line() -> bytes:
    """One line of stdin, unbuffered: the watching thread reads on behind it."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1 << 16)):
        line += byte
    return line


def _send(events: IO[str], event: dict[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")


def _watch_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os._exit(EXIT_ORPHANED)  # end of file: the parent, who alone holds the other end, is gone


if __name__ == "__main__":
    sys.exit(main())
