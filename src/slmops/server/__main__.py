"""``python -m slmops.server``: the control plane without the command line's conveniences.

Prints one line of JSON with its URL once it listens; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from slmops.core.errors import SlmopsError
from slmops.server.main import ServerOptions, run_server


def main() -> int:
    """Parse, run, and turn our errors into an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m slmops.server", description="Run a slmops control plane."
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="database, chunks, metadata and online key"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8420, help="0 takes a free one")
    parser.add_argument(
        "--database-url", default=None, help="SQLAlchemy URL; SQLite in the data folder by default"
    )
    parser.add_argument("--tick-s", type=float, default=1.0, help="pause between the rollout worker's turns")
    parser.add_argument("--poll-s", type=float, default=30.0, help="how often devices check in")
    parser.add_argument("--tls-cert", type=Path, default=None)
    parser.add_argument("--tls-key", type=Path, default=None)
    parser.add_argument("--log-level", default="info")
    given = parser.parse_args()
    options = ServerOptions(**vars(given))
    try:
        run_server(options, on_ready=lambda url: print(json.dumps({"url": url}), flush=True))
    except SlmopsError as error:
        print(f"error: {error.message}\n  fix: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
