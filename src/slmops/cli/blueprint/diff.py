"""``slmops blueprint diff``."""

from __future__ import annotations

import difflib
from pathlib import Path

import click

from slmops.cli.blueprint.document import read_blueprint
from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json
from slmops.client.records import BlueprintRecord
from slmops.core.errors import NotFoundError, UsageError


@click.command("diff")
@click.argument("name")
@click.option(
    "-f",
    "--file",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare this file with what was applied last.",
)
@click.option("--from", "from_revision", type=int, help="Older revision.  [default: the one before --to]")
@click.option("--to", "to_revision", type=int, help="Newer revision.  [default: the current one]")
@with_server
@json_option
def diff(
    name: str,
    file: Path | None,
    from_revision: int | None,
    to_revision: int | None,
    server: str,
    token_file: Path | None,
    as_json: bool,
) -> None:
    """Show what changed between two revisions of blueprint NAME, or what a file would change.

    \b
    Examples:
      slmops blueprint diff home-assistant
      slmops blueprint diff home-assistant --from 1 --to 3
      slmops blueprint diff home-assistant -f blueprint.yaml
    """
    if file is not None and to_revision is not None:
        raise UsageError("--file and --to both say what is newer", hint="leave one of them away")
    with connect(server, token_file) as plane:
        history = {record.revision: record for record in plane.blueprint_history(name)}
    newest = max(history)
    if file is not None:
        older = _revision(history, newest if from_revision is None else from_revision)
        new_name, new_text = str(file), read_blueprint(file)
    else:
        newer = _revision(history, newest if to_revision is None else to_revision)
        older = _revision(history, newer.revision - 1 if from_revision is None else from_revision)
        new_name, new_text = f"{name} revision {newer.revision} by {newer.applied_by}", newer.source
    old_name = f"{name} revision {older.revision} by {older.applied_by}"
    lines = list(
        difflib.unified_diff(
            older.source.splitlines(), new_text.splitlines(), old_name, new_name, lineterm="", n=3
        )
    )
    if as_json:
        print_json({"older": old_name, "newer": new_name, "changed": bool(lines), "diff": lines})
        return
    if not lines:
        click.echo(f"{old_name} and {new_name} say the same")
    for line in lines:
        colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
        click.secho(line, fg=colour)


def _revision(history: dict[int, BlueprintRecord], revision: int) -> BlueprintRecord:
    found = history.get(revision)
    if found is None:
        known = ", ".join(str(number) for number in sorted(history))
        raise NotFoundError(
            f"no revision {revision}; there are: {known}", hint="slmops blueprint history NAME"
        )
    return found
