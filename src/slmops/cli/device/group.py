"""``slmops device``: the fleet's devices, as the control plane knows them."""

from __future__ import annotations

import click

from slmops.cli.device.label import label
from slmops.cli.device.list import list_command
from slmops.cli.device.retire import retire
from slmops.cli.device.show import show
from slmops.cli.device.token_create import create as token_create_command


@click.group()
def device() -> None:
    """Devices: list, show, label, retire, enrolment tokens."""


@device.group("token")
def token() -> None:
    """Enrolment tokens."""


for _verb in (list_command, show, label, retire):
    device.add_command(_verb)
token.add_command(token_create_command)
