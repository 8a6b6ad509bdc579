"""Promise: one model, every runtime side by side; our served decode is at least 0.97 x of the engine driven bare.

    make bench NAME=runtimes                                           # llama.cpp, the small model
    make bench NAME=runtimes ARGS="onnxruntime-genai=EXPORT/genai_config.json llama.cpp=MODEL.gguf"

Of each variant: bytes, KL divergence and same-top from the reference (the first one given, or ``--reference``), a small task,
prefill and decode speed, time to first token, load time, highest resident memory, installed bytes of what its engine needs,
and the time that its export took (``--export-s "NAME=SECONDS"``, as the build's log tells it; else not measured). The table is
printed and drawn (``--picture``). A binding may be in an environment of its own: see slmops.runtimes.environments.

- KL: of the reference's 100 likeliest tokens and one bucket for all others, as far as both sides report them. So it is a lower
  bound, close to the whole one for models that agree; every runtime's own ``/score`` gives it.
- Task: the likelier of several endings of a sentence, by the sum of their log-probabilities.
- Served against bare: turn and turn about on the same prompts, threads, pieces and context, loaded in both orders (processes
  that are alike were seen to differ by a tenth, for a reason not known); the geometric mean of the pairs' ratios. By CPU
  time, which others on the machine do not change much, and by the wall clock, which they do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pydoc_data import topics
from typing import Any

import httpx
from device_world import print_results, result, small_model
from packaging.requirements import Requirement
from runtimes_table import Row, as_svg, as_text

from slmops.runtimes import Engine, EngineSpec, load, open_engine
from slmops.runtimes.bench import bench_engine
from slmops.runtimes.connect import engine_client
from slmops.runtimes.environments import find

CONTEXT_TOKENS, THREADS, PIECE_TOKENS = 1024, 1, 128
PROMPT_TOKENS, DECODE_TOKENS, REPEATS = 256, 64, 3
#: of the pairs served and bare
PAIRS, PAIR_PROMPT_TOKENS, PAIR_TOKENS = 3, 32, 64
WINDOWS, WINDOW_TOKENS, FIRST_SCORED = 4, 160, 32
TOP = 100
LEAST_RATIO = 0.97
BARE = Path(__file__).with_name("bare_engine.py")
#: documents of Python's own language reference, as the interpreter carries it
TEXTS = ("assert", "class", "while", "formatstrings")
#: beginning, right ending, wrong endings
TASK: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("The capital of France is", " Paris", (" London", " Rome")),
    ("The capital of Japan is", " Tokyo", (" Berlin", " Madrid")),
    ("The opposite of hot is", " cold", (" wet", " loud")),
    ("Two plus two equals", " four", (" nine", " seven")),
    ("Water freezes into", " ice", (" gold", " sand")),
    ("The sun rises in the", " east", (" west", " north")),
    ("A baby dog is called a", " puppy", (" kitten", " calf")),
    ("A baby cat is called a", " kitten", (" puppy", " lamb")),
    ("Bees make", " honey", (" milk", " wool")),
    ("The colour of grass is", " green", (" purple", " orange")),
    ("Shakespeare wrote the play", " Hamlet", (" Faust", " Iliad")),
    ("The largest planet in the solar system is", " Jupiter", (" Mercury", " Venus")),
    ("The chemical symbol for gold is", " Au", (" Fe", " Ag")),
    ("A triangle has three", " sides", (" wheels", " colours")),
    ("The first month of the year is", " January", (" June", " October")),
    ("To turn on the light, press the", " switch", (" soup", " river")),
    ("She put the milk in the", " refrigerator", (" oven", " drawer")),
    ("He was thirsty, so he drank a glass of", " water", (" stones", " paper")),
    ("Plants need sunlight and", " water", (" metal", " plastic")),
    ("The Amazon is a", " river", (" desert", " mountain")),
    ("Mount Everest is the highest", " mountain", (" river", " lake")),
    ("A week has seven", " days", (" hours", " months")),
    ("The heart pumps", " blood", (" air", " bone")),
    ("Spiders have eight", " legs", (" wings", " tails")),
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One exported model: the file that its engine opens."""

    runtime: str
    path: Path

    @property
    def name(self) -> str:
        """For the table."""
        folder = self.path.parent.name
        alone = self.path.suffix == ".gguf"
        said = self.path.stem if alone else folder.removeprefix(f"{self.runtime}-")
        return f"{self.runtime} {said.removeprefix('SmolLM2-135M-Instruct.')}"

    def spec(self) -> EngineSpec:
        """Served with these settings, and driven bare with the same."""
        return EngineSpec(
            self.runtime,
            self.path,
            context_tokens=CONTEXT_TOKENS,
            slots=1,
            threads=THREADS,
            kv_cache=load(self.runtime).capabilities.kv_cache_for("q8_0"),
            batch_tokens=PIECE_TOKENS,
            ubatch_tokens=PIECE_TOKENS,
        )

    def file_bytes(self) -> int:
        """What a device stores: the GGUF, or the folder without what an engine left there."""
        if self.path.suffix == ".gguf":
            return self.path.stat().st_size
        return sum(
            one.stat().st_size
            for one in self.path.parent.iterdir()
            if one.is_file() and "cache" not in one.suffix
        )


@dataclass(frozen=True)
class Asked:
    """Token ids that every variant scores: windows of text, and each task item's (right, wrong...) as (ids, start)."""

    windows: list[list[int]]
    items: list[list[tuple[list[int], int]]]


@dataclass(frozen=True)
class Said:
    """A variant's answers to `Asked`: per scored position its likeliest tokens with log-probabilities; task items right."""

    tops: list[dict[int, float]]
    greedy: list[int]
    right_ratio: float


@dataclass(frozen=True)
class Pair:
    """CPU and wall seconds a token, served and bare."""

    served_cpu_s: float
    served_wall_s: float
    bare_cpu_s: float
    bare_wall_s: float


async def asked_of(engine: Engine) -> Asked:
    """By the reference's tokenizer; that the others give the same ids is what the parity gate shows."""
    windows = []
    for name in TEXTS[:WINDOWS]:
        windows.append((await engine.tokenize(topics.topics[name]))[:WINDOW_TOKENS])
    items = []
    for begin, right, wrong in TASK:
        start = len(await engine.tokenize(begin))
        items.append([(await engine.tokenize(begin + ending), start) for ending in (right, *wrong)])
    return Asked(windows, items)


async def said_by(engine: Engine, asked: Asked) -> Said:
    """Score everything."""
    tops: list[dict[int, float]] = []
    greedy: list[int] = []
    for window in asked.windows:
        score = await engine.score(window, start=FIRST_SCORED, top_k=TOP)
        tops += [dict(row) for row in score.top]
        greedy += score.greedy_ids
    right = 0
    for endings in asked.items:
        sums = [sum((await engine.score(ids, start=start)).logprobs) for ids, start in endings]
        right += sums[0] > max(sums[1:])
    return Said(tops, greedy, right / len(asked.items))


def divergence(reference: dict[int, float], other: dict[int, float]) -> float:
    """KL of one position over the tokens that both report and a bucket of the rest, in nats."""
    both = reference.keys() & other.keys()
    total = sum(math.exp(reference[token]) * (reference[token] - other[token]) for token in both)
    rest = max(1.0 - sum(math.exp(reference[token]) for token in both), 0.0)
    rest_other = max(1.0 - sum(math.exp(other[token]) for token in both), 1e-12)
    return total + (rest * math.log(rest / rest_other) if rest > 0 else 0.0)


def footprint_bytes(runtime: str) -> int | None:
    """Bytes of every distribution that the runtime's child needs, slmops itself among them, where its binding is installed."""
    adapter = load(runtime)
    binding = getattr(adapter, "distribution", "xllamacpp" if runtime == "llama.cpp" else None)
    if binding is None:
        return None  # the owner's own server
    roots = ["slmops", binding]
    folders = None
    if runtime != "llama.cpp":
        roots += ["numpy", "tokenizers", "jinja2", "llguidance"]
        place = Path(find(runtime, roots[1:]).python)
        if place != Path(sys.executable):
            folders = [str(one) for one in place.parents[1].glob("lib/python3.*/site-packages")]
    if runtime == "executorch":
        roots.append("torch")
    seen: dict[str, int] = {}
    while roots:
        name = roots.pop().lower().replace("_", "-")
        found = (
            next(iter(metadata.distributions(name=name, path=folders)), None)
            if folders
            else next(iter(metadata.distributions(name=name)), None)
        )
        if name in seen or found is None:
            continue
        seen[name] = sum(_installed_bytes(found))
        for line in found.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                roots.append(requirement.name)
    return sum(seen.values())


def _installed_bytes(found: metadata.Distribution) -> Iterator[int]:
    if (
        found.metadata["Name"] == "slmops"
    ):  # may be installed from a checkout, whose list of files says nothing
        import slmops  # noqa: PLC0415

        yield from (one.stat().st_size for one in Path(slmops.__path__[0]).rglob("*.py"))
        return
    for file in found.files or ():
        with contextlib.suppress(OSError):
            yield Path(str(file.locate())).stat().st_size


class Bare:
    """The bare engine's process."""

    def __init__(self, spec: EngineSpec) -> None:
        adapter = load(spec.runtime)
        python = sys.executable
        if distribution := getattr(adapter, "distribution", None):
            python = find(spec.runtime, (distribution,)).python
        fields = {
            name: getattr(spec, name)
            for name in ("runtime", "context_tokens", "threads", "batch_tokens", "kv_cache", "repack")
        }
        environment = (
            os.environ | getattr(adapter, "environment", {}) | {"OMP_NUM_THREADS": str(spec.threads)}
        )
        self._process = subprocess.Popen(
            [python, str(BARE), json.dumps(fields | {"model_path": str(spec.model_path)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._until("ready")

    def _until(self, beginning: str) -> str:
        """The next line that begins so; bindings write what they like between."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(beginning):
                return line
        raise RuntimeError(f"the bare engine ended with status {self._process.wait()}")

    def answer(self, prompt: Sequence[int], tokens: int) -> dict[str, float]:
        """One measured answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        took: dict[str, float] = json.loads(self._until("{"))
        return took

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def cpu_s(engine: Engine) -> float:
    """CPU time of the engine's threads in nanosecond steps where the kernel tells it; `Engine.cpu_s` has 10 ms steps."""
    try:
        tasks = Path(f"/proc/{engine.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except (OSError, IndexError, ValueError):
        return engine.cpu_s()


async def served_answer(
    engine: Engine, client: httpx.AsyncClient, prompt: Sequence[int], tokens: int
) -> tuple[float, float]:
    """(CPU, wall) seconds of the tokens after the first, streamed."""
    body = {
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
    }
    first: tuple[float, float] | None = None
    answered = 0
    last = (0.0, 0.0)
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if first is None:
                first = cpu_s(engine), time.perf_counter()
                continue
            if '"timings"' in line:  # the last event: every token is counted there, also those without text
                last = cpu_s(engine), time.perf_counter()
                answered = int(json.loads(line.removeprefix("data: "))["timings"]["predicted_n"])
    if first is None or answered != tokens:
        raise RuntimeError(f"expected {tokens} tokens, got {answered}")
    return last[0] - first[0], last[1] - first[1]


async def pairs(engine: Engine, vocabulary: int, bare: Bare | None = None) -> list[Pair]:
    """Served and bare in turn, on prompts that differ from pair to pair; a bare engine that is given was loaded first."""
    bare = bare or await asyncio.to_thread(Bare, engine.spec)
    found = []
    try:
        async with engine_client(engine.socket_path) as client:
            for index in range(PAIRS + 1):
                low, span = vocabulary // 8, vocabulary // 2
                prompt = [
                    low + (7919 * (index + 11) + 104_729 * at) % span for at in range(PAIR_PROMPT_TOKENS)
                ]
                cpu, wall = await served_answer(engine, client, prompt, PAIR_TOKENS)
                took = await asyncio.to_thread(bare.answer, prompt, PAIR_TOKENS)
                if index:  # the first pair warms both up
                    each = PAIR_TOKENS - 1
                    found.append(Pair(cpu / each, wall / each, took["cpu_s"] / each, took["wall_s"] / each))
    finally:
        bare.close()
    return found


async def measure(
    variant: Variant, asked: Asked | None, reference: Said | None, export_s: float | None, *, speeds: bool
) -> tuple[Row, Asked, Said, list[Pair]]:
    """Everything of one variant."""
    began_s = time.perf_counter()
    async with open_engine(variant.spec()) as engine:
        load_s = time.perf_counter() - began_s
        vocabulary = (await engine.properties()).vocab_tokens
        speed = await bench_engine(
            engine, prompt_tokens=PROMPT_TOKENS, decode_tokens=DECODE_TOKENS, repeats=REPEATS
        )
        asked = asked or await asked_of(engine)
        compared = await pairs(engine, vocabulary) if speeds else []
        said = await said_by(engine, asked)
    if speeds:  # the other order of loading: processes that are alike were seen to differ by a tenth
        bare = await asyncio.to_thread(Bare, variant.spec())
        async with open_engine(variant.spec()) as engine:
            compared += await pairs(engine, vocabulary, bare)
    losses = (
        sorted(divergence(a, b) for a, b in zip(reference.tops, said.tops, strict=True))
        if reference
        else None
    )
    same = (
        statistics.mean(a == b for a, b in zip(reference.greedy, said.greedy, strict=True))
        if reference
        else None
    )
    row = Row(
        name=variant.name,
        file_bytes=variant.file_bytes(),
        kld=max(statistics.mean(losses), 0.0) if losses else None,
        kld_p99=losses[math.ceil(0.99 * len(losses)) - 1] if losses else None,
        same_top_ratio=same,
        task_ratio=said.right_ratio,
        prefill_tps=speed.prefill_tps,
        decode_tps=speed.decode_tps,
        ttft_s=speed.ttft_s,
        load_s=load_s,
        peak_rss_bytes=speed.peak_rss_bytes,
        footprint_bytes=footprint_bytes(variant.runtime),
        export_s=export_s,
        busy_ratio=speed.busy_ratio,
    )
    return row, asked, said, compared


def rows_of_result(name: str, compared: Sequence[Pair]) -> list[dict[str, Any]]:
    """Served against bare, by CPU time and by the wall clock."""
    found = []
    for kind in ("cpu", "wall"):
        ours = [1 / getattr(pair, f"served_{kind}_s") for pair in compared]
        theirs = [1 / getattr(pair, f"bare_{kind}_s") for pair in compared]
        ratio = statistics.geometric_mean([a / b for a, b in zip(ours, theirs, strict=True)])
        unit = "tokens a CPU second" if kind == "cpu" else "tokens/s"
        found.append(
            result(
                f"{name}: served decode, by {'CPU time' if kind == 'cpu' else 'the wall clock'}",
                statistics.median(ours),
                statistics.median(theirs),
                "the engine driven bare",
                unit,
                ratio,
                f">= {LEAST_RATIO}",
                ratio >= LEAST_RATIO,
            )
        )
    return found


def _variant(text: str) -> Variant:
    runtime, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"expected RUNTIME=FILE, got {text!r}")
    return Variant(runtime, Path(path).absolute())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", type=_variant, metavar="RUNTIME=FILE")
    parser.add_argument(
        "--reference", type=_variant, help="what the others are compared with; it is measured, too"
    )
    parser.add_argument(
        "--export-s", action="append", default=[], metavar="NAME=SECONDS", help="NAME as in the table"
    )
    parser.add_argument("--picture", type=Path, default=Path(".slmops-cache/bench/runtimes.svg"))
    parser.add_argument("--no-bare", action="store_true", help="leave out served against bare")
    given = parser.parse_args()
    variants: list[Variant] = given.variants or [Variant("llama.cpp", small_model())]
    if given.reference:
        variants = [given.reference, *(one for one in variants if one != given.reference)]
    exports = {name: float(value) for name, _, value in (one.rpartition("=") for one in given.export_s)}
    table: list[Row] = []
    results: list[dict[str, Any]] = []
    asked: Asked | None = None
    reference: Said | None = None
    for variant in variants:
        try:
            row, asked, said, compared = asyncio.run(
                measure(variant, asked, reference, exports.get(variant.name), speeds=not given.no_bare)
            )
        except Exception as error:  # one runtime that is not here does not end the others
            if reference is None:
                raise
            print(f"{variant.name}: {type(error).__name__}: {error}", file=sys.stderr)
            results.append(result(variant.name, 0, 0, "measured at all", "", 0, "serves", False))
            continue
        reference = reference or said
        table.append(row)
        if compared:
            results += rows_of_result(variant.name, compared)
        print(f"{as_text([row])}\nbusy {row.busy_ratio:.2f}", file=sys.stderr, flush=True)
        print(json.dumps(results[-2:]), file=sys.stderr, flush=True)
    title = "One model on every runtime"
    note = f"KL from {table[0].name}; {THREADS} thread, prompt {PROMPT_TOKENS}, answer {DECODE_TOKENS} tokens; green: best"
    print(as_text(table))
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    given.picture.write_text(as_svg(title, note, table), encoding="utf-8")
    print(f"drawn: {given.picture}")
    print_results("runtimes", results)


if __name__ == "__main__":
    main()
