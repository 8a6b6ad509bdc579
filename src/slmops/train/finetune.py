"""The training loop: a LoRA adapter for one base on one file of examples.

Usage::

    python -m slmops.train.finetune --base base.gguf --train train.jsonl --out adapter.gguf --minutes 40

Owns: the loop, its schedule, its checkpoint and its provenance record. One loop, no framework: pack, forward,
loss on the answers, backward, add up over workers, clip, step. ``--steps`` is reproducible on one machine and
number of workers; ``--minutes`` fits the schedule into a time and records the steps it took. A run that was
stopped goes on from ``OUT.checkpoint`` when it is started again with the same inputs and settings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from slmops.core.errors import DocumentError, UsageError
from slmops.train.adapter import write_adapter
from slmops.train.llama import Llama, load_llama
from slmops.train.lora import LoraWeights
from slmops.train.packing import Row, batches, pack, read_examples
from slmops.train.tokenizer import ChatTokenizer
from slmops.train.workers import Exchange, together

CHECKPOINT_EVERY_S = 120.0
REPORT_EVERY_STEPS = 20


@dataclass(frozen=True)
class Settings:
    """What decides the result, besides base and examples.

    Attributes:
        rank: inner width of the adapter.
        alpha: the adapter acts times alpha / rank.
        learning_rate: peak, after the warm-up.
        row_tokens: about how many tokens a step sees in each worker.
        warmup_ratio: part of the schedule in which the rate climbs.
        clip_norm: longest gradient, over all parameters together.
        seed: of the adapter's start and the order of examples.
        steps: length of the schedule; 0 = as many as fit ``minutes``.
        minutes: wall time of the schedule when ``steps`` is 0.
        threads: how many cores to use: so many workers of one thread each (``workers``).
        base_dtype: float32, or bfloat16: twice as fast where the CPU has it.
    """

    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1.2e-3
    row_tokens: int = 420
    warmup_ratio: float = 0.03
    clip_norm: float = 1.0
    seed: int = 7
    steps: int = 0
    minutes: float = 40.0
    threads: int = 2
    base_dtype: str = "bfloat16"


@dataclass
class Progress:
    """Where a run is; a checkpoint holds it."""

    step: int = 0
    examples: int = 0
    epoch: int = 0
    elapsed_s: float = 0.0
    loss: float = 0.0  # running mean, natural log per answer token

    def absorb(self, loss: float) -> None:
        """Fold one step's loss into the running mean (half-life about 35 steps)."""
        self.loss = loss if self.step == 0 else 0.98 * self.loss + 0.02 * loss


def rate_at(done_ratio: float, settings: Settings) -> float:
    """Return the learning rate: linear warm-up, then cosine to zero.

    Args:
        done_ratio: which part of the schedule is done, 0..1.
        settings: peak rate and length of the warm-up.
    """
    if done_ratio < settings.warmup_ratio:
        return settings.learning_rate * done_ratio / settings.warmup_ratio
    after = (done_ratio - settings.warmup_ratio) / (1 - settings.warmup_ratio)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(after, 1.0)))


class Trainer:
    """One run.

    Args:
        llama: the frozen base.
        examples_path: JSON lines, see ``packing.read_examples``.
        tokenizer: of the base.
        settings: see there.
        exchange: with the other workers.
        clock: seconds from any start; only differences count.
    """

    def __init__(
        self,
        llama: Llama,
        examples_path: Path,
        tokenizer: ChatTokenizer,
        settings: Settings,
        exchange: Exchange,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the examples and make a fresh adapter."""
        self.lora = LoraWeights(llama.shape, settings.rank, settings.alpha, settings.seed)
        self.progress = Progress()
        self._llama = llama
        self._settings = settings
        self._exchange = exchange
        self._clock = clock
        self._examples = read_examples(examples_path, tokenizer)
        self._optimizer = torch.optim.AdamW(
            self.lora.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )

    def run(self, checkpoint: Path | None, report: Callable[[Progress, float], None]) -> None:
        """Train to the end of the schedule.

        Args:
            checkpoint: where to keep state about every two minutes; taken up when it exists; None keeps none.
            report: called with the progress and the ratio done, about every twenty steps.
        """
        if checkpoint and checkpoint.exists():
            self._restore(checkpoint)
        rank, workers = self._exchange.rank, self._exchange.workers
        rows = batches(self._examples, self._settings.row_tokens, self._settings.seed)
        for _ in range(
            self.progress.step * workers
        ):  # the order is a function of the seed: go on where we were
            next(rows)
        last, saved = self._clock(), self._clock()
        while (done := self._exchange.agree(self.done_ratio())) < 1.0:
            share = [next(rows) for _ in range(workers)]
            self.progress.epoch, batch = share[rank]
            loss, tokens, examples = self._step(pack(batch), rate_at(done, self._settings))
            self.progress.absorb(loss / tokens)
            self.progress.step += 1
            self.progress.examples += int(examples)
            now = self._clock()
            self.progress.elapsed_s += now - last
            last = now
            if rank == 0 and self.progress.step % REPORT_EVERY_STEPS == 0:
                report(self.progress, self.done_ratio())
            if rank == 0 and checkpoint and now - saved > CHECKPOINT_EVERY_S:
                self._save(checkpoint)
                saved = now
        if rank == 0:
            report(self.progress, 1.0)

    def _step(self, row: Row, rate: float) -> list[float]:
        """Make one step on this worker's row and the others'; return loss, tokens and examples over all."""
        hidden = self._llama.hidden(row.tokens, row.positions, row.mask, self.lora)
        loss = F.cross_entropy(self._llama.logits(hidden[row.predicts]), row.targets, reduction="sum")
        torch.autograd.backward(loss)
        parameters = self.lora.parameters()
        totals = self._exchange.add_up(parameters, loss.item(), len(row.targets), row.examples)
        torch.nn.utils.clip_grad_norm_(parameters, self._settings.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return totals

    def done_ratio(self) -> float:
        """Return which part of the schedule is done, 0..1."""
        if self._settings.steps:
            return min(1.0, self.progress.step / self._settings.steps)
        return min(1.0, self.progress.elapsed_s / (self._settings.minutes * 60))

    def _save(self, path: Path) -> None:
        staging = path.with_name(path.name + ".part")
        state = {
            "settings": asdict(self._settings),
            "examples": len(self._examples),
            "progress": asdict(self.progress),
            "parameters": [leaf.detach() for leaf in self.lora.parameters()],
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, staging)
        staging.replace(path)

    def _restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        if state["settings"] != asdict(self._settings) or state["examples"] != len(self._examples):
            raise UsageError(
                f"{path} belongs to a run with other settings or examples",
                hint=f"remove {path} to start afresh, or repeat the first run's arguments",
            )
        self.progress = Progress(**state["progress"])
        self._optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for leaf, value in zip(self.lora.parameters(), state["parameters"], strict=True):
                leaf.copy_(value)


def provenance(
    base: Path, train: Path, out: Path, settings: Settings, progress: Progress, code: str
) -> dict[str, Any]:
    """Return the record of a finished run: what went in, what came out, with which tools.

    Args:
        base: the base model's file.
        train: the examples' file.
        out: the adapter, already written.
        settings: of the run.
        progress: at its end.
        code: ``code_digest()`` as it was at the start.
    """
    return {
        "adapter": {"file": out.name, "sha256": digest(out), "bytes": out.stat().st_size},
        "base": {"file": base.name, "sha256": digest(base)},
        "examples": {"file": train.name, "sha256": digest(train)},
        "code": {"slmops": version("slmops"), "sha256": code},
        "settings": asdict(settings),
        "steps": progress.step,
        "examples_seen": progress.examples,
        "epochs_begun": progress.epoch + 1,
        "wall_s": round(progress.elapsed_s, 1),
        "final_loss": round(progress.loss, 5),
        "tools": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "gguf", "tokenizers", "numpy")},
        },
        "machine": platform.machine(),
    }


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    whole = hashlib.sha256()
    with path.open("rb") as content:
        while piece := content.read(1 << 20):
            whole.update(piece)
    return whole.hexdigest()


def code_digest() -> str:
    """Return one SHA-256 over this room's source files, by name."""
    whole = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        whole.update(f"{source.name} {digest(source)}\n".encode())
    return whole.hexdigest()


def finetune(base: Path, train: Path, out: Path, settings: Settings, licence: str) -> dict[str, Any]:
    """Train an adapter and write it, with ``OUT.provenance.json`` beside it.

    Raises:
        DocumentError: the examples file is missing or malformed.
        BaseModelError: the base cannot be read.
        UsageError: the checkpoint of another run lies there.
    """
    if not train.is_file():
        hint = "make it first, e.g. with examples/home-intents/make_dataset.py"
        raise DocumentError(f"{train}:1:1: no such file", hint=hint)
    code = code_digest()
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(out.name + ".checkpoint")
    llama = _load(base, settings)
    blank = LoraWeights(llama.shape, settings.rank, settings.alpha, settings.seed)
    parameters = sum(leaf.numel() for leaf in blank.parameters())
    with together(settings.threads, parameters, _work, base, train, settings, checkpoint) as exchange:
        trainer = Trainer(llama, train, ChatTokenizer(base), settings, exchange)
        trainer.run(checkpoint, _print_progress)
    header = {"general.name": out.stem, "general.license": licence}
    write_adapter(out, trainer.lora, "llama", header)
    record = provenance(base, train, out, settings, trainer.progress, code) | {"license": licence}
    out.with_name(out.name + ".provenance.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    checkpoint.unlink(missing_ok=True)
    return record


def _work(exchange: Exchange, base: Path, train: Path, settings: Settings, checkpoint: Path) -> None:
    """Train as one of the other workers."""
    trainer = Trainer(_load(base, settings), train, ChatTokenizer(base), settings, exchange)
    trainer.run(checkpoint, _print_progress)


def _load(base: Path, settings: Settings) -> Llama:
    torch.set_num_threads(1)  # workers, not threads, use the cores
    return load_llama(base, getattr(torch, settings.base_dtype))


def _print_progress(progress: Progress, done_ratio: float) -> None:
    speed = progress.examples / progress.elapsed_s if progress.elapsed_s else 0.0
    print(
        f"{done_ratio:6.1%}  step {progress.step}  epoch {progress.epoch}  loss {progress.loss:.4f}"
        f"  {speed:.1f} examples/s  {progress.elapsed_s:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """Run from the command line."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m slmops.train.finetune", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--base", type=Path, required=True, help="GGUF file of the base model")
    parser.add_argument("--train", type=Path, required=True, help="examples, one JSON object a line")
    parser.add_argument("--out", type=Path, required=True, help="the adapter to write (GGUF)")
    parser.add_argument("--license", default="apache-2.0", help="written into the adapter's header")
    for name, value in asdict(default).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    options = vars(parser.parse_args())
    settings = replace(default, **{name: options[name] for name in asdict(default)})
    record = finetune(options["base"], options["train"], options["out"], settings, options["license"])
    print(json.dumps(record))


if __name__ == "__main__":
    main()
