"""``slmops rollout approve | reject | pause | resume | abort | rollback``: verbs that differ in one word only."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json

#: verb -> what it does, and a reason that somebody might give
_VERBS = {
    "approve": ("Approve a rollout that waits for it.", "looked at the evidence"),
    "reject": ("Say no to a rollout that waits for approval.", "no golden evidence for site hki"),
    "pause": ("Stop offering; what devices have stays.", "support is asleep"),
    "resume": ("Let a paused rollout go on.", "support is back"),
    "abort": ("Stop; exposed devices are treated by the blueprint's on_abort.", "wrong system prompt"),
    "rollback": ("Take every device that this rollout touched back.", "complaints from site hki"),
}


def _command(verb: str, text: str, reason: str) -> click.Command:
    help_text = f'{text}\n\n\b\nExample:\n  slmops rollout {verb} r-v387nr7bet --reason "{reason}"'

    @click.command(verb, help=help_text)
    @click.argument("rollout_id")
    @click.option("--reason", default="", help="Why; kept in the audit trail.")
    @with_server
    @json_option
    def act(rollout_id: str, reason: str, server: str, token_file: Path | None, as_json: bool) -> None:
        with connect(server, token_file) as plane:
            found = plane.rollout_action(rollout_id, verb, reason)
        print_json(found) if as_json else click.echo(f"{found.id}: {found.phase} {found.reason}".rstrip())

    return act


ACTIONS = tuple(_command(verb, text, reason) for verb, (text, reason) in _VERBS.items())
