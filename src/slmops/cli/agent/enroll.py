"""``slmops agent enroll``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from slmops.agent.facts import installed_runtimes
from slmops.agent.main import EnrollOptions, enroll
from slmops.cli.agent.folder import in_folder
from slmops.cli.connection import json_option
from slmops.cli.output import print_json
from slmops.core.device.fit import EXTERNAL
from slmops.core.device.profile import BUILTIN_PROFILES
from slmops.core.errors import UsageError


@click.command("enroll")
@click.argument("url")
@click.argument("token", default="-")
@in_folder
@click.option("--profile", required=True, help="Device profile, for example pi5-8gb.")
@click.option("--name", default="", help="Wished name.  [default: host name]")
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE", help="For selectors, for example site=hki."
)
@click.option(
    "--listen",
    default="127.0.0.1:8421",
    show_default=True,
    help="Where applications find the model; port 0 picks a free one.",
)
@click.option("--ram-limit-bytes", type=int, help="Memory that slmops may use.  [default: the profile's]")
@click.option("--cpu-cores", type=float, help="CPU share of engines.")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME",
    help="Inference engine that this device may use; may be repeated.  [default: every installed one]",
)
@click.option("--threads", default=1, show_default=True, help="Compute threads of an engine.")
@click.option(
    "--external",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Describes your own OpenAI-compatible server, for the runtime external (docs/howto/bring-your-own-server.md).",
)
@json_option
def enroll_command(
    url: str,
    token: str,
    directory: Path,
    profile: str,
    name: str,
    labels: tuple[str, ...],
    listen: str,
    ram_limit_bytes: int | None,
    cpu_cores: float | None,
    runtimes: tuple[str, ...],
    threads: int,
    external: Path | None,
    as_json: bool,
) -> None:
    """Enrol this device at the control plane URL. TOKEN "-" reads it from SLMOPS_ENROLL_TOKEN or standard input.

    \b
    Example:
      slmops device token create | slmops agent enroll http://127.0.0.1:8420 --profile pi5-8gb --dir /var/lib/slmops
    """
    if token == "-":
        token = os.environ.get("SLMOPS_ENROLL_TOKEN") or sys.stdin.readline().strip()
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--listen {listen!r} is not HOST:PORT", hint="write --listen 127.0.0.1:8421")
    if EXTERNAL in runtimes and external is None:
        raise UsageError(
            f"--runtime {EXTERNAL}: nothing says how the device's own server is started",
            hint="give --external FILE too; see docs/howto/bring-your-own-server.md",
        )
    missing = sorted(set(runtimes) - {EXTERNAL, *installed_runtimes()})
    if missing:
        raise UsageError(
            f"--runtime {missing[0]}: not installed here; installed: {', '.join(installed_runtimes()) or 'none'}",
            hint=f'pip install "slmops[{missing[0].replace(".", "-")}]", or leave the option away',
        )
    known = BUILTIN_PROFILES.get(profile)
    if known is None:
        click.echo(
            f"note: {profile!r} is none of the built-in profiles ({', '.join(BUILTIN_PROFILES)}): selectors must name it "
            "exactly like this, and its memory limit is this machine's unless --ram-limit-bytes is given",
            err=True,
        )
    elif not known.agent:
        raise UsageError(
            f"--profile {profile}: slmops' agent does not run on such a device; its profile is for exports only",
            hint=f"hand over the build's archives/{profile}@*.tar to the application; here, write one of "
            f"{', '.join(name for name, other in BUILTIN_PROFILES.items() if other.agent)}",
        )
    config = enroll(
        EnrollOptions(
            directory=directory,
            server_url=url,
            token=token,
            name=name or os.uname().nodename.lower(),
            profile=profile,
            labels=dict(item.partition("=")[::2] for item in labels),
            gateway_host=host.strip("[]"),
            gateway_port=int(port),
            ram_limit_bytes=ram_limit_bytes or (known.ram_bytes if known is not None else None),
            cpu_cores=cpu_cores,
            threads=threads,
            runtimes=runtimes,
            external=external,
        )
    )
    if as_json:
        print_json(
            {
                "device_id": config.device_id,
                "server_url": config.server_url,
                "profile": config.profile,
                "directory": str(directory),
            }
        )
    else:
        click.echo(f"enrolled as {config.device_id}: slmops agent run --dir {directory}")
