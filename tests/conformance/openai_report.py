"""The OpenAI conformance report: real clients against real devices, one column a runtime, written to docs/reference/openai.md.

    python -m tests.conformance.openai_report run llama.cpp MODEL.gguf      # one runtime, into docs/reference/openai/
    python -m tests.conformance.openai_report write                         # the page, from what was run

A run starts an agent that fetches, proves and serves the model, and asks it everything in `openai_cases`. What was found
is kept as one JSON file for each runtime; the page is made from those (a test compares). Exit status 1 when a case was
``silent``: a field that is neither honoured, nor refused, nor named in the warning header.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from slmops.artifact.gguf_layout import parse_gguf
from slmops.protocol.messages import ServingSettings
from slmops.runtimes import load
from slmops.testing.agent_process import AgentProcess
from slmops.testing.control_plane import FakeControlPlane
from slmops.testing.releases import SignedReleases

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "openai.md"
FOUND = PAGE.with_suffix("")
MODEL = "smol"
SERVING = ServingSettings(
    context_tokens=512, kv_cache="f16", parallel=2, micro_batch_tokens=128, system_prompt=""
)
QUESTIONS = {"Name three colours.": "Red, green and blue."}
CLIENTS = ("openai", "litellm", "langchain-openai")

HEAD = """# OpenAI conformance

What OpenAI's clients get from a device, by runtime. Made by running the clients against an agent that serves a release;
not written by hand: `python -m tests.conformance.openai_report run RUNTIME MODEL`, then `... write`.

- **yes**: honoured, and its effect was seen in the answer.
- **refused**: an error in OpenAI's shape (`400`, `error.param`, `error.code`) that says what is not supported.
- **warned**: dropped, and named in the header `X-Slmops-Ignored`.

There is no fourth kind: a case that is neither fails the run. A model's skill is not part of it: a small model may answer
a question with tools in plain text.

`/v1/responses` is a small subset: text in and out, earlier turns in `input`, `instructions`, sampling, `text.format`,
streaming events. A device keeps nothing between requests and runs nothing: `previous_response_id`, `conversation`,
`background`, `store: true`, `tools`, `reasoning` and the like are refused by name. The clients' default for `store` is to
leave it out, which is served and not stored; the answer says `store: false`.
"""


@contextmanager
def device(runtime: str, model: Path, folder: Path) -> Iterator[str]:
    """An agent that serves the model; gives the address of its gateway."""
    releases = SignedReleases(model=MODEL)
    parts, shape, kind = {}, None, "raw"
    if model.suffix == ".gguf":
        kind = "gguf"
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = parse_gguf(content).shape()
        shape = {name: getattr(found, name) for name in found.__dataclass_fields__}
    elif model.suffix != ".json" or model.name == "genai_config.json":
        parts = {
            path.name: path.read_bytes()
            for path in model.parent.iterdir()
            if path != model and path.is_file()
        }
    made = asyncio.run(
        releases.add(
            model,
            "1.0.0",
            QUESTIONS,
            runtime=runtime,
            artifact_format=kind,
            tolerance=2.0,
            shape=shape,
            parts=parts,
        )
    )
    with (
        FakeControlPlane(releases) as plane,
        AgentProcess(folder / "device", plane, ram_limit_bytes=8 << 30) as agent,
    ):
        agent.start()
        plane.assignment = made.assignment(1, serving=SERVING)
        try:
            plane.wait_for(lambda p: p.last is not None and p.last.phase == "committed", 180)
        except BaseException:
            print(agent.text()[-3000:], file=sys.stderr)
            raise
        yield agent.url


def run(runtime: str, model: Path) -> dict[str, Any]:
    """Ask everything of one runtime."""
    from tests.conformance.openai_cases import Clients, cases, run_case

    with tempfile.TemporaryDirectory() as folder, device(runtime, model, Path(folder)) as url:
        clients = Clients(url, MODEL)
        try:
            outcomes = [asdict(run_case(case, clients)) for case in cases()]
        finally:
            clients.close()
    return {
        "runtime": runtime,
        "version": load(runtime).version(),
        "model": model.name,
        "clients": {name: metadata.version(name) for name in CLIENTS},
        "outcomes": outcomes,
    }


def page(found: list[dict[str, Any]]) -> str:
    """The page's text for what was found."""
    names = [one["runtime"] for one in found]
    by_case = [{(row["client"], row["case"]): row for row in one["outcomes"]} for one in found]
    order = list(dict.fromkeys(key for rows in by_case for key in rows))
    words = {"honoured": "yes"}
    clients = ", ".join(f"{name} {version}" for name, version in found[0]["clients"].items())
    lines = [
        HEAD,
        f"Clients: {clients}. Runtimes: "
        + "; ".join(f"{one['runtime']} ({one['version']}, {one['model']})" for one in found)
        + ".\n",
    ]
    refusals: dict[str, str] = {}
    for client in CLIENTS:
        lines += [f"## {client}\n", "| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for key in (key for key in order if key[0] == client):
            cells = []
            for rows in by_case:
                row = rows.get(key)
                cells.append("not run" if row is None else words.get(row["outcome"], row["outcome"]))
                if row is not None and row["outcome"] == "refused":
                    refusals.setdefault(key[1], row["words"])
            lines.append(f"| {key[1]} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "## What a refusal says\n",
        "| case | message of the first runtime that refuses it |",
        "|---|---|",
    ]
    lines += [f"| {case} | {said.replace('|', chr(92) + '|')} |" for case, said in refusals.items()]
    return "\n".join(lines) + "\n"


def read_found() -> list[dict[str, Any]]:
    """What was run, llama.cpp first."""
    found = [json.loads(path.read_bytes()) for path in FOUND.glob("*.json")]
    return sorted(found, key=lambda one: (one["runtime"] != "llama.cpp", one["runtime"]))


def main() -> int:
    """See the module."""
    verb, *arguments = sys.argv[1:]
    if verb == "write":
        PAGE.write_text(page(read_found()), encoding="utf-8")
        return 0
    runtime, model = arguments
    found = run(runtime, Path(model).resolve())
    FOUND.mkdir(exist_ok=True)
    (FOUND / f"{runtime}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    silent = [row for row in found["outcomes"] if row["outcome"] == "silent"]
    for row in found["outcomes"]:
        print(f"{row['outcome']:9} {row['client']:17} {row['case']}: {row['words']}")
    if silent:
        print(
            f"{len(silent)} fields are silent: the answer did not change. A small test model can be too sure of its answer "
            "to show seeds, penalties and biases: ask again with a real one"
        )
    return 1 if silent else 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
