"""Which control plane a command talks to, and as whom. Tokens come from the environment or a file, never from argv."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from slmops.client import ControlPlane
from slmops.core.errors import TokenError

DEFAULT_SERVER = "http://127.0.0.1:8420"
Command = TypeVar("Command", bound=Callable[..., Any])


def config_folder() -> Path:
    """The user's slmops folder."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "slmops"


def with_server(command: Command) -> Command:
    """Add ``--server`` and ``--token-file`` to a command; it gets ``server`` and ``token_file``."""
    command = click.option(
        "--token-file",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="SLMOPS_TOKEN_FILE",
        help="File with the operator token (or set SLMOPS_TOKEN).",
    )(command)
    return click.option(
        "--server",
        default=DEFAULT_SERVER,
        envvar="SLMOPS_SERVER",
        show_default=True,
        help="The control plane's URL.",
    )(command)


def connect(server: str, token_file: Path | None) -> ControlPlane:
    """A client with the operator token from SLMOPS_TOKEN, ``--token-file`` or ``~/.config/slmops/token``.

    Raises:
        TokenError: there is no token, or its file cannot be read.
    """
    token = os.environ.get("SLMOPS_TOKEN", "").strip()
    path = token_file or config_folder() / "token"
    if not token:
        try:
            token = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise TokenError(
                f"no operator token: SLMOPS_TOKEN is not set and {path} cannot be read",
                hint="make one on the server: slmops server token create --role operator > ~/.config/slmops/token",
            ) from error
    if not token.isascii():
        raise TokenError(
            "the operator token has characters that no token has", hint="copy it again, without quotes"
        )
    return ControlPlane(server, token)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
