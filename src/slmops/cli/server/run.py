"""``slmops server run``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.server.folder import data_option
from slmops.core.errors import UsageError

#: what ``server run`` prints on standard output before its URL, once it accepts connections
READY = "control plane ready:"


def parse_listen(listen: str) -> tuple[str, int]:
    """``127.0.0.1:8420`` as host and port.

    Raises:
        UsageError: there is no port in it.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--listen {listen!r} is not HOST:PORT", hint="write --listen 127.0.0.1:8420")
    return host.strip("[]"), int(port)


@click.command("run")
@data_option
@click.option(
    "--listen", default="127.0.0.1:8420", show_default=True, help="HOST:PORT; port 0 picks a free one."
)
@click.option("--database-url", help="SQLAlchemy URL.  [default: SQLite in the data folder]")
@click.option("--poll-s", default=30.0, show_default=True, help="How often devices check in, seconds.")
@click.option("--tick-s", default=1.0, show_default=True, help="How often rollouts are looked at, seconds.")
@click.option(
    "--tls-cert", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Certificate chain, PEM."
)
@click.option(
    "--tls-key", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Private key, PEM."
)
def run(
    data_dir: Path,
    listen: str,
    database_url: str | None,
    poll_s: float,
    tick_s: float,
    tls_cert: Path | None,
    tls_key: Path | None,
) -> None:
    """Run the control plane until it is stopped.

    \b
    Example:
      slmops keys init --server-data data && slmops server run --data-dir data
    """
    from slmops.server.main import ServerOptions, run_server  # noqa: PLC0415 - FastAPI loads only here

    host, port = parse_listen(listen)
    run_server(
        ServerOptions(
            host=host,
            port=port,
            data_dir=data_dir,
            database_url=database_url,
            poll_s=poll_s,
            tick_s=tick_s,
            tls_cert=tls_cert,
            tls_key=tls_key,
        ),
        on_ready=lambda url: click.echo(f"{READY} {url}"),
    )
