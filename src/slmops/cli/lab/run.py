"""``slmops lab run``."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click
import msgspec

from slmops.artifact.lab_evidence import LAB, LabReport, encode_lab
from slmops.build import load_build
from slmops.cli.build.directory import BUILD_DIRECTORY
from slmops.cli.connection import json_option
from slmops.cli.lab.networks import NETWORKS, parse_network
from slmops.cli.lab.session import LabOptions, run_lab
from slmops.cli.local_fleet import containers
from slmops.cli.local_fleet.processes import end_in_order
from slmops.cli.output import megabytes, print_json, print_table
from slmops.core.errors import GateError, UsageError


@click.command("run")
@click.argument("directory", type=BUILD_DIRECTORY)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="NAME",
    help="Only this class of devices; may be repeated.",
)
@click.option(
    "--network",
    default="lan",
    show_default=True,
    help=f"Link to the control plane: {', '.join(NETWORKS)}, or rate=1MB/s,delay=100ms,loss=0.5%,cut=10s.",
)
@click.option(
    "--cpu-cores", type=float, default=1.0, show_default=True, help="CPU share of a device's engine."
)
@click.option("--context-tokens", type=int, default=1024, show_default=True, help="Context to serve with.")
@click.option("--kv-cache", default="q8_0", show_default=True, help="Element type of the KV cache.")
@click.option(
    "--timeout-s", type=float, default=600.0, show_default=True, help="Longest that one device may take."
)
@click.option(
    "--image",
    default="",
    help="Run each agent in a container of this image, with podman; see deploy/containers.  [default: as a process]",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the report goes.  [default: lab.json in DIRECTORY, from where a release takes it]",
)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep devices, logs and the control plane's data in this new folder.",
)
@json_option
def run(
    directory: Path,
    profiles: tuple[str, ...],
    network: str,
    cpu_cores: float,
    context_tokens: int,
    kv_cache: str,
    timeout_s: float,
    image: str,
    out: Path | None,
    keep: Path | None,
    as_json: bool,
) -> None:
    """Run each variant of the build in DIRECTORY on an emulated device of its class.

    Each device is a real agent process with the memory and CPU limits of its profile (by cgroup where the machine
    allows it; the report says what was enforced), behind the network that was asked for. It enrols, fetches, proves and
    serves the variant. Speeds are those of this machine under these limits, not those of the real board.

    The report becomes part of the evidence of the release that is made of this build. Exit code 5 when a device does not
    serve.

    \b
    Examples:
      slmops lab run build/home-intents
      slmops lab run build/home-intents --profile pi-zero2-512mb --network flaky
      slmops lab run build/home-intents --image localhost/slmops-agent-llama-cpp
    """
    parse_network(network)
    if image:
        containers.require(image)
    known = sorted({variant.profile for variant in load_build(directory).variants})
    unknown = sorted(set(profiles) - set(known))
    if unknown:
        raise UsageError(
            f"--profile {unknown[0]}: this build has no variant for it", hint=f"it has: {', '.join(known)}"
        )
    if keep is not None and keep.exists():
        raise UsageError(f"--keep {keep} exists already", hint="give a new folder")
    end_in_order()
    work = keep or Path(tempfile.mkdtemp(prefix="slmops-lab-"))
    options = LabOptions(
        directory, work, profiles, network, cpu_cores, context_tokens, kv_cache, timeout_s, image
    )
    try:
        report = run_lab(options, lambda line: click.echo(line, err=as_json))
    finally:
        if keep is None:
            shutil.rmtree(work, ignore_errors=True)
    place = out or directory / LAB
    place.write_bytes(encode_lab(report))
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        _print(report)
        click.echo(f"\nwrote {place}")
    if not report.passed:
        bad = [d for d in report.devices if d.outcome != "committed" or d.failed]
        raise GateError(
            "not every device serves: "
            + "; ".join(f"{d.profile} on {d.runtime}: {d.reason or d.outcome}" for d in bad),
            hint="see the reasons; --keep DIR keeps the devices' logs",
        )


def _print(report: LabReport) -> None:
    rows = [
        (
            device.profile,
            device.runtime,
            device.outcome,
            f"{device.golden_kept}/{device.golden_prompts}",
            f"{device.asked - device.failed}/{device.asked}",
            megabytes(device.fetched_bytes),
            f"{device.seconds:.0f}",
            "" if device.speed is None else f"{device.speed.decode_tps:.0f}",
            "" if device.speed is None else megabytes(device.speed.rss_bytes),
        )
        for device in report.devices
    ]
    print_table(
        ("profile", "runtime", "outcome", "golden", "answered", "fetched", "s", "decode/s", "peak RSS"), rows
    )
    limits = {f"{limit} by {how}" for device in report.devices for limit, how in device.limits.items()}
    for text in sorted(limits):
        click.echo(f"limit: {text}")
    click.echo("speeds: this machine's under these limits, not those of the real board")
