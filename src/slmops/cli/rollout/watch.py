"""``slmops rollout watch``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json
from slmops.cli.rollout.printing import print_rollout, progress_line
from slmops.core.errors import EXIT_GATE
from slmops.core.rollout.machine import ENDED, Phase

_GOOD_ENDS = frozenset({Phase.COMPLETED.value, Phase.COMPLETED_PARTIAL.value})
_ENDED = frozenset(phase.value for phase in ENDED)


@click.command("watch")
@click.argument("rollout_id")
@click.option("--every-s", default=1.0, show_default=True, help="How often to look, seconds.")
@with_server
@json_option
def watch(rollout_id: str, every_s: float, server: str, token_file: Path | None, as_json: bool) -> None:
    """Follow a rollout until it ends; exit code 5 when it did not complete.

    With --json, progress goes to standard error and the ended rollout to standard output.

    \b
    Example:
      slmops rollout watch r-v387nr7bet
    """
    with connect(server, token_file) as plane:
        seen = ""
        while True:
            found = plane.rollout(rollout_id)
            line = progress_line(found)
            if line != seen:
                click.echo(line, err=as_json)
                seen = line
            if found.phase in _ENDED:
                print_json(found) if as_json else print_rollout(found)
                raise SystemExit(0 if found.phase in _GOOD_ENDS else EXIT_GATE)
            time.sleep(every_s)
