"""``slmops device label``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json
from slmops.core.errors import UsageError


@click.command("label")
@click.argument("device_id")
@click.argument("labels", nargs=-1, required=True, metavar="KEY=VALUE...")
@with_server
@json_option
def label(
    device_id: str, labels: tuple[str, ...], server: str, token_file: Path | None, as_json: bool
) -> None:
    """Set labels (KEY=VALUE) or remove them (KEY-).

    \b
    Example:
      slmops device label kitchen-1 canary=always site=hki old-
    """
    changes: dict[str, str | None] = {}
    for item in labels:
        key, equals, value = item.partition("=")
        if equals and key and value:
            changes[key] = value
        elif item.endswith("-") and not equals:
            changes[item[:-1]] = None
        else:
            raise UsageError(
                f"label {item!r} is neither KEY=VALUE nor KEY-", hint="for example: canary=always"
            )
    with connect(server, token_file) as plane:
        found = plane.set_labels(device_id, changes)
    print_json(found) if as_json else click.echo(
        f"{found.id}: {', '.join(f'{k}={v}' for k, v in sorted(found.labels.items()))}"
    )
