"""``slmops release publish``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import Progress, megabytes, print_json
from slmops.cli.release.bundle import BUNDLE
from slmops.release import PublishEvent, open_bundle
from slmops.release import publish as publish_bundle


@click.command("publish")
@click.argument("bundle", type=BUNDLE)
@with_server
@json_option
def publish(bundle: Path, server: str, token_file: Path | None, as_json: bool) -> None:
    """Upload BUNDLE to the control plane; only what is missing there is sent.

    \b
    Example:
      slmops release publish releases/home-intents-1.2.0
    """
    progress = Progress(quiet=as_json)

    def show(event: PublishEvent) -> None:
        progress.update(f"publishing {event}")

    with connect(server, token_file) as plane:
        report = publish_bundle(open_bundle(bundle), plane, show)
    if as_json:
        print_json(report)
    else:
        progress.done(f"published: {report.blobs_sent} blobs, {megabytes(report.bytes_sent)} sent")
