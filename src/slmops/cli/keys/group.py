"""``slmops keys``: the offline keys that sign releases."""

from __future__ import annotations

import click

from slmops.cli.keys.init import init
from slmops.cli.keys.list import list_command


@click.group()
def keys() -> None:
    """Offline signing keys: root and release. The control plane's own keys never sign a release."""


for _verb in (init, list_command):
    keys.add_command(_verb)
