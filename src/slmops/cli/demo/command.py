"""``slmops demo``: options, and what happens around the scenario."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

import slmops
from slmops.cli.demo.fleets import fleet_for
from slmops.cli.demo.scenario import DemoOptions, Scenario
from slmops.cli.local_fleet.processes import end_in_order
from slmops.cli.output import print_json
from slmops.core.errors import NotFoundError, UsageError

_EXAMPLE = Path("examples") / "home-intents"


def find_project() -> Path:
    """The example project: below the current folder, or beside the sources of an editable install.

    Raises:
        NotFoundError: neither has it.
    """
    for root in (Path.cwd(), Path(slmops.__file__).resolve().parents[2]):
        if (root / _EXAMPLE / "recipe.yaml").exists():
            return root / _EXAMPLE
    raise NotFoundError(
        f"{_EXAMPLE}/recipe.yaml is not here",
        hint="run 'slmops demo' in a clone of the repository, or give --project DIR",
    )


@click.command()
@click.option(
    "--fast", is_flag=True, help="Evaluate less, and exit at the end instead of keeping the dashboard up."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the summary as JSON.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="Where the demo keeps its files.",
)
@click.option(
    "--project",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The example project.  [default: examples/home-intents]",
)
@click.option(
    "--runtimes",
    default="",
    metavar="all|NAME,NAME",
    help="Instead of six llama.cpp devices one for each runtime: llama.cpp, external, onnxruntime-genai, litert-lm, executorch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def demo(
    fast: bool, out: Path | None, work: Path, project: Path | None, runtimes: str, as_json: bool
) -> None:
    """The main job, end to end, on this machine.

    Builds three variants, signs them, rolls them out to six real agent processes in waves, and shows how a bad release
    is refused while a client keeps asking.

    \b
    Examples:
      slmops demo
      slmops demo --fast --out summary.json
      slmops demo --fast --runtimes onnxruntime-genai,external
    """
    end_in_order()
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} is no folder", hint="make it first, or write elsewhere")
    scenario = Scenario(DemoOptions(project or find_project(), work.resolve(), fast, fleet_for(runtimes)))
    try:
        summary = scenario.run()
        if out is not None:
            out.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
        if as_json:
            print_json(summary)
        scenario.require_expected_outcome()
        if not fast:
            scenario.keep_up()
    finally:
        scenario.close()
