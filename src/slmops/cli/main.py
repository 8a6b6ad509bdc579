"""The root command: nouns loaded when they are asked for, and the one place where an error becomes an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import NoReturn

import click

from slmops.cli.output import print_error
from slmops.core.errors import EXIT_BUG, EXIT_USAGE, SlmopsError, UsageError

#: noun -> where its group lives; a noun whose extra is not installed says so when it is used
NOUNS: dict[str, tuple[str, str]] = {
    "demo": ("slmops.cli.demo.command:demo", "the main job, end to end, on this machine"),
    "init": ("slmops.cli.init.command:init", "a starter project: recipe and examples"),
    "doctor": ("slmops.cli.doctor.command:doctor", "what works here, what this machine can hold"),
    "build": ("slmops.cli.build.group:build", "recipe -> measured variants"),
    "lab": ("slmops.cli.lab.group:lab", "each variant on a device of its class, as evidence"),
    "release": ("slmops.cli.release.group:release", "build -> signed release, publishing, channels"),
    "keys": ("slmops.cli.keys.group:keys", "offline signing keys"),
    "server": ("slmops.cli.server.group:server", "the control plane"),
    "profile": ("slmops.cli.profile.group:profile", "classes of devices"),
    "device": ("slmops.cli.device.group:device", "devices of the fleet"),
    "blueprint": ("slmops.cli.blueprint.group:blueprint", "declared state of a cohort"),
    "rollout": ("slmops.cli.rollout.group:rollout", "waves, verdicts, pause, abort, rollback"),
    "agent": ("slmops.cli.agent.group:agent", "the device side"),
}

#: third-party module -> extra that installs it, for a helpful message
_EXTRAS = {
    "numpy": "build",
    "gguf": "build",
    "yaml": "build",
    "pydantic": "build",
    "jsonschema": "build",
    "fastapi": "server",
    "sqlalchemy": "server",
    "alembic": "server",
    "jinja2": "server",
    "structlog": "server",
    "xllamacpp": "llama-cpp",
    "hassil": "demo",
}


#: a path that somebody gave and that this user may not use, or that is no folder
_NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST})


class _LazyNouns(click.Group):
    """Imports a noun only when it is used, so that a device without the build extra still has its commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(NOUNS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = NOUNS.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place[0].partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").split(".")[0])
            if extra is None:
                raise
            raise click.ClickException(
                f"'slmops {cmd_name}' needs {error.name}: pip install \"slmops[{extra}]\""
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Nouns"):
            formatter.write_dl([(name, text) for name, (_, text) in NOUNS.items()])


@click.group(
    cls=_LazyNouns, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="slmops")
def root() -> None:
    """Take a small language model from a folder to a fleet of edge devices, and keep it good there.

    \b
    Start here:  slmops demo --fast
    Exit codes:  0 ok · 1 bug · 2 usage · 3 trust · 4 auth · 5 gate not passed · 75 transient, try again
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``slmops`` script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        root.main(arguments, prog_name="slmops", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        if "--json" in arguments:
            print_error(UsageError(error.format_message(), hint="see --help"), as_json=True)
        else:
            error.show()
        sys.exit(EXIT_USAGE)
    except SlmopsError as error:
        print_error(error, as_json="--json" in arguments)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `slmops ... | head` is no error
        sys.exit(0)
    except OSError as error:
        if error.errno not in _NOT_OURS or error.filename is None:
            _say_bug(error)
        refused = UsageError(f"{error.filename}: {error.strerror}", hint="choose a path that you may use")
        print_error(refused, as_json="--json" in arguments)
        sys.exit(EXIT_USAGE)
    except Exception as error:  # the last resort: say that it is our fault, and keep the traceback
        _say_bug(error)


def _say_bug(error: BaseException) -> NoReturn:
    import traceback  # noqa: PLC0415 - only for bugs

    click.echo(
        f"error[bug]: {type(error).__name__}: {error}\n  this is a bug in slmops: please report it with the traceback below",
        err=True,
    )
    traceback.print_exception(error)
    sys.exit(EXIT_BUG)


if __name__ == "__main__":
    main()
