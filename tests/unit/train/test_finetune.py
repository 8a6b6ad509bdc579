"""The loop: it learns, repeats itself, goes on after a stop, and refuses another run's checkpoint."""

# ruff: noqa: E402 - what needs torch is imported after the question whether it is there
from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.support.tiny_model import make_tiny_gguf

from slmops.core.errors import DocumentError, UsageError
from slmops.train.finetune import Progress, Settings, Trainer, finetune, rate_at
from slmops.train.llama import load_llama
from slmops.train.tokenizer import ChatTokenizer
from slmops.train.workers import Exchange

SETTINGS = Settings(
    rank=4, alpha=8.0, learning_rate=0.02, row_tokens=200, steps=12, threads=1, base_dtype="float32"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and threads that spin on shared cores lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny random model."""
    return make_tiny_gguf(tmp_path / "tiny.gguf", seed=3)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Twenty examples with one rule: answer with the second word."""
    path = tmp_path / "train.jsonl"
    words = ["red", "blue", "green", "black", "white"]
    lines = [
        {"messages": [{"role": "user", "content": f"{a} {b}"}], "answer": b}
        for a in words
        for b in words
        if a != b
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def alone(parameters: int) -> Exchange:
    """The exchange of a single worker."""
    return Exchange(
        0,
        torch.zeros(1, parameters),
        torch.zeros(1, 3, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        threading.Barrier(1),  # type: ignore[arg-type]
    )


def trainer(base: Path, train: Path, settings: Settings, clock: Iterator[float] | None = None) -> Trainer:
    """One worker, in this process, whose clock gives the listed times."""
    llama = load_llama(base)
    parameters = 2 * settings.rank * (64 * 4 + 64 * 2 + 32 * 2 + (64 + 256) * 3)
    ticks = clock or iter(range(1_000_000))
    return Trainer(
        llama, train, ChatTokenizer(base), settings, alone(parameters), clock=lambda: float(next(ticks))
    )


def silent(progress: Progress, done_ratio: float) -> None:
    """Report nothing."""


def test_two_workers_learn_and_write_adapter_and_record(base: Path, train: Path, tmp_path: Path) -> None:
    """Two processes end with a lower loss than chance, an adapter, a record of it, and no checkpoint."""
    settings = Settings(rank=4, alpha=8.0, learning_rate=0.02, row_tokens=150, steps=40, base_dtype="float32")
    record = finetune(base, train, tmp_path / "out" / "a.gguf", settings, "apache-2.0")
    assert record["steps"] == 40
    assert record["examples_seen"] > 80
    untrained = trainer(base, train, replace(SETTINGS, steps=1))
    untrained.run(None, silent)
    assert record["final_loss"] < 0.7 * untrained.progress.loss
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.gguf", "a.gguf.provenance.json"]
    stored = json.loads((tmp_path / "out" / "a.gguf.provenance.json").read_text(encoding="utf-8"))
    assert stored == record


def test_stopped_run_goes_on_where_it_was(base: Path, train: Path, tmp_path: Path) -> None:
    """A run that is stopped after its checkpoint and started again gives the numbers of one that was not."""
    whole = trainer(base, train, SETTINGS)
    whole.run(None, silent)

    checkpoint = tmp_path / "c"
    with pytest.raises(StopIteration):  # its clock runs out: the run breaks off somewhere in the middle
        trainer(base, train, SETTINGS, clock=iter(range(0, 3600 * 8, 3600))).run(checkpoint, silent)
    assert checkpoint.exists()
    second = trainer(base, train, SETTINGS)
    second.run(checkpoint, silent)
    assert second.progress.step == SETTINGS.steps
    for mine, theirs in zip(second.lora.parameters(), whole.lora.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_checkpoint_of_other_settings_is_refused(base: Path, train: Path, tmp_path: Path) -> None:
    """It is not taken up silently, and not overwritten."""
    checkpoint = tmp_path / "c"
    trainer(base, train, SETTINGS, clock=_hours()).run(checkpoint, silent)
    kept = checkpoint.read_bytes()
    with pytest.raises(UsageError, match="other settings"):
        trainer(base, train, replace(SETTINGS, seed=8)).run(checkpoint, silent)
    assert checkpoint.read_bytes() == kept


def test_rate_climbs_then_falls_to_zero() -> None:
    """Warm-up to the peak, cosine to zero."""
    settings = Settings(learning_rate=1.0, warmup_ratio=0.1)
    assert rate_at(0.0, settings) == 0.0
    assert rate_at(0.1, settings) == pytest.approx(1.0)
    assert rate_at(0.55, settings) == pytest.approx(0.5)
    assert rate_at(1.0, settings) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("line", "place"), [("{not json", ":2:2:"), ('{"answer": "x"}', ":2:1:"), ('["list"]', ":2:1:")]
)
def test_malformed_example_is_named_by_line_and_column(
    base: Path, tmp_path: Path, line: str, place: str
) -> None:
    """The second line is at fault, and the message says so."""
    path = tmp_path / "train.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}], "answer": "b"}
    path.write_text(json.dumps(good) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DocumentError, match=place):
        trainer(base, path, SETTINGS)


def _hours() -> Iterator[float]:
    """A clock on which every look is an hour later: a checkpoint after each step."""
    return iter(range(0, 3600 * 10_000, 3600))
