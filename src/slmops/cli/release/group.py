"""``slmops release``: sign, publish, promote."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.keys.group import ask_passphrase, keys_option, workspace_of
from slmops.cli.output import Progress, megabytes, print_json, print_table
from slmops.core.errors import UsageError
from slmops.release import PublishEvent, create_release, open_bundle, verify_bundle
from slmops.release import publish as publish_bundle

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def release() -> None:
    """Signed releases: create, verify, publish, promote to a channel."""


def parse_waivers(waive: tuple[str, ...], reasons: tuple[str, ...]) -> dict[str, str]:
    """Pair ``--waive`` with ``--reason`` in order.

    Raises:
        UsageError: a gate is waived without saying why.
    """
    if len(waive) != len(reasons) or not all(reason.strip() for reason in reasons):
        raise UsageError(
            f"{len(waive)} gates are waived, {len(reasons)} reasons are given",
            hint="write --waive GATE --reason 'why' for each gate",
        )
    return dict(zip(waive, reasons, strict=True))


@release.command("create")
@click.argument("build", type=_DIRECTORY)
@click.option(
    "--version",
    required=True,
    help="Version label, for example 1.0.0. A version never changes once it is released.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Bundle directory.  [default: releases/MODEL-VERSION]",
)
@click.option(
    "--waive",
    multiple=True,
    metavar="GATE",
    help="Let a gate through that did not pass (metric, or profile:metric).",
)
@click.option("--reason", multiple=True, help="Why; signed into the release and shown. One for each --waive.")
@keys_option
@json_option
def create(
    build: Path,
    version: str,
    out: Path | None,
    waive: tuple[str, ...],
    reason: tuple[str, ...],
    keys_folder: Path | None,
    as_json: bool,
) -> None:
    r"""Sign BUILD (a build directory) as a release.

    \b
    Examples:
      slmops release create build/home-intents --version 1.0.0
      slmops release create build/x --version 1.0.1 --waive task.exact_match --reason "pilot, agreed with Ann"
    """
    folder = out or Path("releases") / f"{build.resolve().name}-{version}"
    bundle = create_release(
        build,
        version=version,
        workspace=workspace_of(keys_folder),
        passphrase=ask_passphrase(),
        waivers=parse_waivers(waive, reason),
        out_dir=folder,
        created=datetime.now(timezone.utc),
    )
    if as_json:
        print_json(
            {
                "directory": str(folder),
                "digest": bundle.digest,
                "model": bundle.release.model,
                "version": bundle.release.version,
                "release_seq": bundle.release.release_seq,
            }
        )
        return
    click.echo(
        f"signed {bundle.release.model}@{bundle.release.version} (release_seq {bundle.release.release_seq})"
    )
    click.echo(f"  digest {bundle.digest}")
    for waiver in bundle.release.waivers:
        click.secho(f"  waived {waiver.gate}: {waiver.reason}", fg="yellow")
    click.echo(f"  next: slmops release publish {folder}")


@release.command("verify")
@click.argument("bundle", type=_DIRECTORY)
@keys_option
@json_option
def verify(bundle: Path, keys_folder: Path | None, as_json: bool) -> None:
    """Hash every byte of BUNDLE again and check its signatures."""
    report = verify_bundle(open_bundle(bundle), workspace_of(keys_folder))
    if as_json:
        print_json(report)
    else:
        click.echo(f"{bundle}: verified ({report})")


@release.command("publish")
@click.argument("bundle", type=_DIRECTORY)
@with_server
@json_option
def publish(bundle: Path, server: str, token_file: Path | None, as_json: bool) -> None:
    """Upload BUNDLE to the control plane; only what is missing there is sent."""
    progress = Progress(quiet=as_json)

    def show(event: PublishEvent) -> None:
        progress.update(f"publishing {event}")

    with connect(server, token_file) as plane:
        report = publish_bundle(open_bundle(bundle), plane, show)
    if as_json:
        print_json(report)
    else:
        progress.done(f"published: {report.blobs_sent} blobs, {megabytes(report.bytes_sent)} sent")


@release.command("list")
@click.option("--model", default="", help="Only this model.")
@with_server
@json_option
def list_command(model: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """List published releases, newest first."""
    with connect(server, token_file) as plane:
        found = plane.releases(model)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            r.model,
            r.version,
            r.release_seq,
            r.digest[:12],
            ", ".join(r.channels),
            ", ".join(r.profiles),
            "waived: " + ", ".join(w.gate for w in r.waivers) if r.waivers else "",
        )
        for r in found
    ]
    print_table(
        ("model", "version", "seq", "digest", "channels", "profiles", "notes"),
        rows,
        empty="no releases: slmops release publish BUNDLE",
    )


@release.command("show")
@click.argument("reference")
@with_server
@json_option
def show(reference: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show a published release: MODEL@VERSION, or the beginning of its digest."""
    with connect(server, token_file) as plane:
        found = plane.release(reference)
    if as_json:
        print_json(found)
        return
    click.echo(
        f"{found.model}@{found.version}  {found.digest}\nlicence {found.licence}, built from {found.base.name}"
    )
    for waiver in found.waivers:
        click.secho(f"waived {waiver.gate}: {waiver.reason}", fg="yellow")
    rows = [
        (
            v.profile,
            megabytes(v.artifact_bytes),
            f"{v.measured.bits_per_weight:.2f}",
            f"{v.measured.kld_mean:.4f}",
            f"{v.measured.decode_tps:.0f}",
        )
        for v in found.variants
    ]
    print_table(("profile", "file", "bits/w", "mean KL", "decode/s"), rows)


@release.command("promote")
@click.argument("reference")
@click.option("--channel", required=True, help="For example stable.")
@with_server
@json_option
def promote(reference: str, channel: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Point a channel at a release; blueprints that follow it begin a rollout."""
    with connect(server, token_file) as plane:
        result = plane.promote(reference, channel)
    if as_json:
        print_json(result)
        return
    click.echo(
        f"{result.model} {result.channel} -> {result.version}" + ("" if result.changed else " (as before)")
    )
    for rollout in result.rollouts:
        click.echo(f"  rollout {rollout}: slmops rollout watch {rollout}")
