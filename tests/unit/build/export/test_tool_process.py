"""The toolchain protocol, with this interpreter as the toolchain and a real script: results, limits, logs, deaths."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slmops.build.export import tool_process
from slmops.build.export.tool_process import TOOLS, ToolProcess, Unable
from slmops.core.errors import BuildError, DeadlineError

SCRIPT = """
import sys, time
sys.path.insert(0, {tools!r})
from tool_protocol import serve

def export(request, tell):
    tell(0.5, "half")
    print("a library's line on stdout")
    what = request["what"]
    if what == "fail":
        raise ValueError("no such tensor")
    if what == "die":
        import os
        print("last words", file=sys.stderr, flush=True)
        os._exit(9)
    if what == "hang":
        time.sleep(60)
    if what == "eat":
        return {{"n": len(bytearray(1 << 31))}}
    return {{"answer": 42}}

class Model:
    def facts(self):
        return {{"eos": [2]}}
    def tokenize(self, text):
        return list(text.encode())
    def render(self, messages):
        raise NotImplementedError("no template here")
    def logits(self, token_ids, first):
        import numpy as np
        return np.eye(3, dtype=np.float32)[list(token_ids)][first:]
    def generate(self, token_ids, max_tokens, *, stop):
        return [token + 1 for token in token_ids][:max_tokens]

sys.exit(serve(export, lambda request: Model()))
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "made.py").write_text(SCRIPT.format(tools=str(TOOLS)))
    monkeypatch.setattr(tool_process, "TOOLS", tmp_path)
    yield tmp_path


def run(
    folder: Path, *, limit_s: float = 20.0, memory_bytes: int | None = None, **request: object
) -> ToolProcess:
    return ToolProcess(
        Path(sys.executable), "made", request, folder / "log", memory_bytes=memory_bytes, limit_s=limit_s
    )


def test_a_result_comes_with_its_progress_and_prints_are_log(tool: Path) -> None:
    """What a library prints never mixes with the protocol: it is in the log."""
    told: list[tuple[float | None, str]] = []
    with run(tool, op="export", what="well") as process:
        assert process.result(lambda ratio, note: told.append((ratio, note))) == {"answer": 42}
    assert told == [(0.5, "half")]
    assert "a library's line" in (tool / "log").read_text()


def test_an_error_is_told_with_the_logs_end(tool: Path) -> None:
    with run(tool, op="export", what="fail") as process, pytest.raises(BuildError) as raised:
        process.result()
    assert "ValueError: no such tensor" in raised.value.message
    assert "Traceback" in str(raised.value.fields["log"])


def test_a_death_without_a_word_shows_status_and_log(tool: Path) -> None:
    with run(tool, op="export", what="die") as process, pytest.raises(BuildError) as raised:
        process.result()
    assert "exit status 9" in raised.value.message
    assert "last words" in raised.value.message


def test_a_tool_that_hangs_is_killed_at_its_limit(tool: Path) -> None:
    with run(tool, op="export", what="hang", limit_s=1.5) as process, pytest.raises(DeadlineError):
        process.result()


def test_a_tool_that_eats_memory_is_stopped(tool: Path) -> None:
    """Past its limit it ends with our error and not with the machine's out-of-memory killer."""
    with (
        run(tool, op="export", what="eat", memory_bytes=512 << 20) as process,
        pytest.raises(Exception) as raised,
    ):
        process.result()
    assert getattr(raised.value, "code", "") in ("device.no_memory", "build")


def test_a_session_answers_and_says_what_it_cannot(tool: Path) -> None:
    with run(tool, op="session") as process:
        assert process.result()["eos"] == [2]
        assert process.ask(op="tokenize", texts=["ab", ""]) == [[97, 98], []]
        with pytest.raises(Unable, match="no template here"):
            process.ask(op="render", conversations=[[]])
        rows = process.logits([0, 2, 1], 1)
        assert np.array_equal(rows, np.eye(3, dtype=np.float32)[[2, 1]])
        assert process.ask(op="generate", prompts=[[5, 6]], max_tokens=1) == [[6]]
