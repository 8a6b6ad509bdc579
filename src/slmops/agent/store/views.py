"""The folder in which an engine finds the files of a variant under their names (ADR 0015).

Files are kept by digest; an engine that reads several wants them side by side, under the names that they call each
other by. A view is such a folder: a second name (hard link) for each file, so it takes no room and no time. It is made
anew whenever an engine starts, hence never out of date, and each engine has its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from slmops.agent.store.files import as_device_error
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import Slot
from slmops.core.errors import DigestError


def make_view(layout: Layout, name: str, slot: Slot) -> Path:
    """The path of the model file that a slot's engine opens; its parts lie beside it (blocking).

    Args:
        layout: the device's folder.
        name: of the view: the slot's, or another one for an engine beside the two.
        slot: whose files it shows. A lone GGUF needs no view and is opened under its digest.

    Raises:
        DigestError: a file is gone from the disk.
        NoSpaceError: the disk has no room for a folder.
    """
    model = slot.artifact("model")
    if not model.path:
        return layout.artifact(model.sha256)
    view = layout.view(name)
    try:
        shutil.rmtree(view, ignore_errors=True)
        for file in slot.artifacts:
            if file.path:
                place = view / file.path
                place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _link(layout.artifact(file.sha256), place)
    except FileNotFoundError as error:
        raise DigestError(
            f"a file of {slot.model_name}@{slot.assignment.version} is not on disk: {error.filename}",
            hint="it is fetched again by itself",
        ) from error
    except OSError as error:
        raise as_device_error(error, view) from error
    return view / model.path


def _link(file: Path, place: Path) -> None:
    """A second name; an engine may refuse a symbolic link that leads out of its folder, so that comes last."""
    try:
        os.link(file, place)
    except FileNotFoundError:
        raise
    except OSError:
        if not file.exists():
            raise
        os.symlink(os.path.relpath(file, place.parent), place)


def remove_views(layout: Layout, keep: Collection[str]) -> None:
    """Remove the other views: a second name keeps a file's bytes on the disk (blocking)."""
    if not layout.views.is_dir():
        return
    for view in layout.views.iterdir():
        if view.name not in keep:
            shutil.rmtree(view, ignore_errors=True)


def remove_view(layout: Layout, name: str) -> None:
    """Remove one view (blocking); safe when there is none."""
    shutil.rmtree(layout.view(name), ignore_errors=True)
