"""What the build gives to a step that lives here; the rooms share its form, not its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol


class Context(Protocol):
    """The build's step context; see ``slmops.build.graph.StepContext``."""

    @property
    def files(self) -> Mapping[str, Path]:
        """Input files by name."""
        ...

    @property
    def values(self) -> Mapping[str, Any]:
        """Values of the steps before, by input name."""
        ...

    @property
    def params(self) -> Mapping[str, Any]:
        """JSON values."""
        ...

    @property
    def out(self) -> Path:
        """Folder for the step's files."""
        ...

    @property
    def progress(self) -> Callable[[float | None, str], None]:
        """Call with a share done and a note."""
        ...

    @property
    def checkpoints(self) -> Path | None:
        """Folder that outlives a kill."""
        ...
