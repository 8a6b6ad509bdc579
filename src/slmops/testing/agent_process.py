"""A real agent process on a real folder, for tests and benches: started, asked, killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
import msgspec

from slmops.agent.main import EnrollOptions, enroll
from slmops.agent.store.journal import Journal, read_journal
from slmops.agent.store.layout import Layout
from slmops.artifact.digest import UNREADABLE_JSON
from slmops.testing.control_plane import TOKEN, FakeControlPlane
from slmops.testing.engine import FAKE_RUNTIME, write_fake_model
from slmops.testing.releases import MadeRelease, SignedReleases

QUESTIONS = {"capital of Finland": "Helsinki", "capital of Sweden": "Stockholm", "two and two": "four"}
GARBAGE = {question: "#### ####" for question in QUESTIONS}


def make_release(releases: SignedReleases, folder: Path, version: str, **model: object) -> MadeRelease:
    """A good release whose model answers QUESTIONS, of some chunks."""
    padding = int(str(model.pop("padding_bytes", 3_000_000)))
    parts: dict[str, bytes] = model.pop("parts", {})  # type: ignore[assignment]
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    path = write_fake_model(folder / f"{version}.json", QUESTIONS, needs=list(parts), **model)  # type: ignore[arg-type]
    _pad(path, padding)
    return asyncio.run(
        releases.add(
            path, version, QUESTIONS, runtime=FAKE_RUNTIME, prompts={"default": "Be brief."}, parts=parts
        )
    )


def make_bad_release(releases: SignedReleases, folder: Path, version: str) -> MadeRelease:
    """A release that loads, answers garbage, and whose own golden pack was made to match."""
    path = write_fake_model(folder / f"{version}.json", GARBAGE)
    _pad(path, 3_000_000)
    return asyncio.run(releases.add(path, version, GARBAGE, runtime=FAKE_RUNTIME))


def _pad(path: Path, padding_bytes: int) -> None:
    """Give a model file the size and the entropy of weights: the same ones in every version, as most tensors are."""
    model = json.loads(path.read_text(encoding="utf-8"))
    model["padding"] = random.Random(1).randbytes(padding_bytes // 2).hex()
    path.write_text(json.dumps(model), encoding="utf-8")


class AgentProcess:
    """Enrolled in ``folder``; started and killed at will."""

    def __init__(self, folder: Path, plane: FakeControlPlane, *, ram_limit_bytes: int = 2 << 30) -> None:
        self.layout = Layout(folder)
        enroll(
            EnrollOptions(
                directory=folder,
                server_url=plane.url,
                token=TOKEN,
                name="device-1",
                profile="pi5-8gb",
                labels={},
                gateway_port=0,
                ram_limit_bytes=ram_limit_bytes,
                extra_runtime=FAKE_RUNTIME,
            )
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the agent and wait until its gateway listens."""
        self.log = (self.layout.root / "agent.log").open("ab")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-m", "slmops.cli.main", "agent", "run", "--dir", str(self.layout.root)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)
        run_file = self.layout.root / "run.json"
        while not (run_file.exists() and self._pid_in(run_file) == self.process.pid):
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)

    @staticmethod
    def _pid_in(run_file: Path) -> int:
        try:
            return int(msgspec.json.decode(run_file.read_bytes())["pid"])
        except (OSError, *UNREADABLE_JSON):
            return 0

    @property
    def url(self) -> str:
        """The gateway."""
        return str(msgspec.json.decode((self.layout.root / "run.json").read_bytes())["url"])

    def engines(self) -> list[int]:
        """Process ids of the running engines."""
        assert self.process is not None
        while True:
            try:
                return [child for child in _children(self.process.pid) if alive(child)]
            except (FileNotFoundError, ProcessLookupError):  # a thread ended while its children were read
                if not alive(self.process.pid):
                    return []

    def kill(self) -> None:
        """Kill -9, as a power cut would; no engine may outlive its agent."""
        assert self.process is not None
        engines = self.engines()
        self.process.kill()
        self.process.wait()
        self.log.close()
        _until_gone(engines)

    def stop(self) -> int:
        """Ask it to stop; returns the exit code."""
        assert self.process is not None
        engines = self.engines() if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.log.close()
        _until_gone(engines)
        return code

    def journal(self) -> Journal:
        """The journal on disk."""
        return read_journal(self.layout.journal)

    def text(self) -> str:
        """The log so far."""
        return (self.layout.root / "agent.log").read_text(encoding="utf-8", errors="replace")

    def ask(self, question: str = "What is the capital of Finland?", **more: object) -> httpx.Response:
        """One chat request."""
        body = {
            "model": "assistant",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 64,
            **more,
        }
        return httpx.post(f"{self.url}/chat/completions", json=body, timeout=60.0, trust_env=False)

    def answer(self, question: str = "What is the capital of Finland?") -> str:
        """The text of one answer."""
        response = self.ask(question)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _children(pid: int) -> set[int]:
    """Child processes of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


def _until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"engines outlive their agent: {pids}"
        time.sleep(0.01)
