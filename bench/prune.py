"""What pruning gives and costs on the small model: vocabulary, width, depth, recovery, and a verdict on sparsity.

Every cut is made to SmolLM2-135M with the tool's own steps. Text is Python's own documentation (``pydoc_data.topics``): topics
that are learned from and calibrated on, and other topics that everything is measured on. Divergences are taken from the model
before the cut, on the unquantised files; bytes and speed are those of plain Q8_0 files of both, so that only the cut differs.

    python bench/prune.py [--quick]        about 25 minutes on one core of its own; recovery needs torch (slmops[train])
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from device_world import print_results, result, small_model

from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, NewTensor, open_gguf, write_gguf
from slmops.build.graph import StepContext
from slmops.build.steps import divergence, prune_blocks, prune_vocabulary, sparsify, teacher, weights
from slmops.build.steps.calibrate import imatrix
from slmops.build.structure import Structure, cut
from slmops.runtimes import EngineSpec
from slmops.runtimes.bench import bench_model
from slmops.runtimes.llama_cpp.activations import collect_moments
from slmops.runtimes.llama_cpp.logits import LogitModel
from slmops.runtimes.llama_cpp.quantise import quantise_rows

KEEP_TOKENS, KEEP_WIDTH, DROP_LAYERS = 16_384, 1280, 2
SERVING = {"context_tokens": 1024, "kv_cache": "f16", "parallel": 1, "micro_batch_tokens": 64}
SEQUENCE_TOKENS = 256
#: of each topic the first parts are taken, first parts first
PARTS, PART_CHARACTERS = 24, 1200


class Bench:
    """A work folder, the models in it, and what was measured of them."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder = folder
        self.held_tokens = 1024 if quick else 3072
        #: what the cuts and reconstruction are fitted to, and what is learned from beside it, both as a build does by default
        self.fitted_tokens = 2048 if quick else 16384
        self.distil_tokens = 2048 if quick else 8192
        self.drop_layers = 1 if quick else DROP_LAYERS
        self.repeats = 1 if quick else 3
        self.began_s = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.eight_bit: dict[str, Path] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began_s:5.0f} s] {text}", flush=True)

    def step(
        self, name: str, run: Any, files: dict[str, Path], values: dict[str, Any] | None = None, **params: Any
    ) -> Any:
        """Run a step as a build would; its files are under its name."""
        out = self.folder / name
        out.mkdir()
        began = time.monotonic()
        value = run(StepContext(files, values or {}, params, out, lambda ratio, note: None))
        shown = {
            k: round(v, 5) if isinstance(v, float) else v
            for k, v in value.items()
            if not isinstance(v, dict) and "sha256" not in k
        }
        self.say(f"{name}: {shown} in {time.monotonic() - began:.0f} s")
        return value

    def model(self, name: str) -> Path:
        return self.folder / name / "model.gguf"

    def measure(self, name: str, path: Path, dense: str) -> dict[str, Any]:
        """Divergence, same-top and perplexity of an unquantised model on the held-out text."""
        files = {"model": path, "text": self.folder / "held.json"}
        kept = {"ids": "ids.npy", "logprobs": "logprobs.npy", "mass": "tail-mass.npy"}
        files |= {kind: self.folder / dense / name for kind, name in kept.items()}
        value: dict[str, Any] = self.step(f"measure {name}", divergence.compare, files)
        return value

    def write_text(self, path: Path) -> None:
        """Token ids of both halves of the documentation, by a model's own tokenizer."""
        halves = sorted(topics)[::2], sorted(topics)[1::2]
        with LogitModel(path) as model:
            for name, wanted, half in (
                ("watch.json", 2048, halves[0][::4]),
                (
                    "learn.json",
                    self.fitted_tokens + self.distil_tokens,
                    [n for i, n in enumerate(halves[0]) if i % 4],
                ),
                ("held.json", self.held_tokens, halves[1]),
            ):
                sequences: list[list[int]] = []
                for part, topic in ((part, topic) for part in range(PARTS) for topic in half):
                    text = topics[topic].strip()[part * PART_CHARACTERS : (part + 1) * PART_CHARACTERS]
                    token_ids = model.tokenize(text)[:SEQUENCE_TOKENS]
                    if len(token_ids) > 64 and sum(map(len, sequences)) < wanted:
                        sequences.append(token_ids)
                document: Any = sequences
                if name == "held.json":
                    document = [
                        {"id": str(i), "token_ids": ids, "start": 16} for i, ids in enumerate(sequences)
                    ]
                (self.folder / name).write_text(json.dumps(document))
                self.say(f"{name}: {len(sequences)} texts, {sum(map(len, sequences))} tokens")

    def to_q8_0(self, name: str, source: Path) -> Path:
        """The same model in Q8_0."""
        target = self.folder / f"{name}.q8_0.gguf"
        with open_gguf(source) as model:
            write_gguf(
                target,
                model,
                [_q8_0(model, tensor) for tensor in model.layout.tensors],
                replace={"general.file_type": None},
            )
        self.eight_bit[name] = target
        return target

    def speeds(self, repeats: int) -> dict[str, dict[str, float]]:
        """Decode and prefill of every Q8_0 file, by turns, so that a slow minute slows all; medians."""
        found: dict[str, list[Any]] = {name: [] for name in self.eight_bit}
        for _ in range(repeats):
            for name, path in self.eight_bit.items():
                spec = EngineSpec(
                    runtime="llama.cpp", model_path=path, context_tokens=1024, slots=1, ubatch_tokens=64
                )
                found[name].append(
                    asyncio.run(bench_model(spec, prompt_tokens=128, decode_tokens=48, repeats=1))
                )
        return {
            name: {
                "decode": statistics.median(run.decode_tps for run in runs),
                "prefill": statistics.median(run.prefill_tps for run in runs),
                "busy": statistics.median(run.busy_ratio for run in runs),
            }
            for name, runs in found.items()
        }

    def add(
        self, case: str, ours: float, peer: float, peer_name: str, unit: str, promise: str, holds: bool
    ) -> None:
        self.rows.append(
            result(case, ours, peer, peer_name, unit, ours / peer if peer else 0.0, promise, holds)
        )


def _q8_0(model: GgufFile, tensor: Tensor) -> NewTensor:
    if len(tensor.shape) < 2:
        return NewTensor(tensor.name, tensor.type_name, tensor.shape, lambda: bytes(model.blob(tensor)))
    return NewTensor(
        tensor.name, "Q8_0", tensor.shape, partial(lambda t: quantise_rows("Q8_0", model.rows(t)), tensor)
    )


def width_without_make_up(bench: Bench, dense: Path) -> Path:
    """The simpler rule that prototypes used: neurons by E[h^2] |w|^2, and nothing makes up for those that go."""
    sequences = json.loads((bench.folder / "learn.json").read_text())[:16]
    neurons: dict[int, tuple[int, ...]] = {}
    target = bench.folder / "peer-width.gguf"
    with open_gguf(dense) as model:
        names = [f"blk.{layer}.ffn_down.weight" for layer in range(model.layout.number("block_count"))]
        moments = collect_moments(dense, sequences, names)
        for layer, name in enumerate(names):
            tensor = model.tensor(name)
            assert tensor is not None
            scores = np.diag(moments[name]) * (model.rows(tensor) ** 2).sum(axis=0)
            neurons[layer] = tuple(sorted(int(i) for i in np.argsort(-scores)[:KEEP_WIDTH]))
        cut(target, model, Structure(neurons=neurons))
    return target


def recover(bench: Bench, name: str, dense: str) -> Path:
    """Reconstruction, then distillation; the model after each."""
    from slmops.train import steps  # noqa: PLC0415 - imports no torch, but there is no need for it without

    learn, watch = bench.folder / "learn.json", bench.folder / "watch.json"
    files = {
        "model": bench.model(name),
        "teacher": bench.model(dense),
        "text": learn,
        "watch": watch,
        "structure-0": bench.folder / name / "structure.json",
    }
    bench.step(f"reconstruct {name}", steps.reconstruct, files, tokens=bench.fitted_tokens)
    kept = {kind: bench.folder / "teacher" / f"{kind}.npy" for kind in ("ids", "logprobs")}
    fresh = bench.folder / "teacher" / "learn.json"
    files = {"model": bench.model(f"reconstruct {name}"), "text": fresh, "watch": watch, **kept}
    asked = {"method": "lora", "rank": 16, "epochs": 1, "learning_rate": 1e-4, "seed": 7, "keep_zeros": False}
    bench.step(f"distil {name}", steps.distil, files, tokens=bench.distil_tokens, **asked)
    return bench.model(f"distil {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less text: a look, not a measurement")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    options = parser.parse_args()
    folder = options.keep.absolute() if options.keep else Path(tempfile.mkdtemp(prefix="slmops-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run(Bench(folder, options.quick))
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def run(bench: Bench) -> None:
    has_torch = importlib.util.find_spec("torch") is not None
    # ---- vocabulary: a third of the tokens, and no prediction over them changes
    bench.step("whole", weights.reference, {"model": small_model()})
    (bench.folder / "calibration.txt").write_text(
        "\n".join(" ".join(topics[name].split())[:2000] for name in sorted(topics)[::2])
    )
    files = {"model": bench.model("whole"), "calibration": bench.folder / "calibration.txt"}
    trimmed = bench.step("vocabulary", prune_vocabulary.vocabulary, files, keep_vocabulary_tokens=KEEP_TOKENS)
    bench.write_text(bench.model("vocabulary"))
    dense = bench.step(
        "dense",
        divergence.reference,
        {"model": bench.model("vocabulary"), "text": bench.folder / "held.json"},
    )
    for name in ("whole", "vocabulary"):
        bench.to_q8_0(name, bench.model(name))
    exact = restricted_divergence(bench)
    bench.say(f"whole model over the kept tokens against the trimmed model: {exact:.2e} nats a token")

    # ---- width and depth, each from the trimmed model, before and after recovery
    learn = {"model": bench.model("vocabulary"), "text": bench.folder / "learn.json"}
    bench.step(
        "width",
        prune_blocks.width,
        learn,
        keep_ffn_width=KEEP_WIDTH,
        moment_tokens=bench.fitted_tokens,
        probe_tokens=0,
    )
    bench.step(
        "depth", prune_blocks.depth, learn, drop_layers=bench.drop_layers, probe_tokens=512, screen_tokens=96
    )
    cuts = {name: bench.measure(name, bench.model(name), "dense") for name in ("width", "depth")}
    peer = bench.measure(
        "width, no make-up", width_without_make_up(bench, bench.model("vocabulary")), "dense"
    )
    for name in cuts:
        bench.to_q8_0(name, bench.model(name))
    rebuilt: dict[str, dict[str, Any]] = {}
    recovered: dict[str, dict[str, Any]] = {}
    if has_torch:
        bench.step(
            "teacher",
            teacher.keep,
            {**learn, "watch": bench.folder / "watch.json"},
            tokens=bench.distil_tokens,
            fitted_tokens=bench.fitted_tokens,
        )
        for name in cuts:
            path = recover(bench, name, "vocabulary")
            rebuilt[name] = bench.measure(
                f"reconstructed {name}", bench.model(f"reconstruct {name}"), "dense"
            )
            recovered[name] = bench.measure(f"recovered {name}", path, "dense")
    else:
        bench.say("no recovery: torch is not installed here (pip install 'slmops[train]')")

    # ---- sparsity: a verdict for this runtime
    bench.step("sparse", sparsify.sparsify, learn, pattern="2:4", ratio=0.5, tokens=4096)
    sparse = bench.measure("sparse", bench.model("sparse"), "dense")
    bench.step("imatrix", imatrix, learn)
    types = {}
    with open_gguf(bench.model("vocabulary")) as model:
        types = {t.name: "Q4_0" for t in model.layout.tensors if len(t.shape) > 1}
    variant = bench.folder / "sparse.q4_0.gguf"
    with open_gguf(bench.model("sparse")) as model:
        tensors = [
            NewTensor(t.name, "Q4_0", t.shape, partial(lambda x: quantise_rows("Q4_0", model.rows(x)), t))
            if t.name in types
            else NewTensor(t.name, t.type_name, t.shape, partial(lambda x: bytes(model.blob(x)), t))
            for t in model.layout.tensors
        ]
        write_gguf(variant, model, tensors, replace={"general.file_type": None})
    files = {
        "dense": bench.model("vocabulary"),
        "variant": variant,
        "imatrix": bench.folder / "imatrix" / "imatrix.npz",
    }
    report = bench.step(
        "report", sparsify.report, files, {"choice": {"types": types}},
        serving=SERVING, prompt_tokens=128, decode_tokens=48, repeats=bench.repeats, profile="bench", others=[],
    )  # fmt: skip
    bench.say(f"sparsity: {report['verdict']}")

    speeds = bench.speeds(bench.repeats)
    for name, speed in speeds.items():
        bench.say(
            f"{name}: {speed['decode']:.0f} decode, {speed['prefill']:.0f} prefill tokens/s, busy {speed['busy']:.2f}"
        )
    add_rows(bench, trimmed, exact, dense, cuts, rebuilt, recovered, peer, sparse, report, speeds)
    bench.say("done")
    sys.stdout.flush()
    print_results("prune", bench.rows)


def restricted_divergence(bench: Bench) -> float:
    """KL divergence of the trimmed model from the whole one over the kept tokens, renormalised, on the same tokens."""
    kept = list(Structure.decode((bench.folder / "vocabulary" / "structure.json").read_bytes()).tokens or ())
    sequences = [entry["token_ids"] for entry in json.loads((bench.folder / "held.json").read_text())][:2]
    values = []
    with LogitModel(bench.model("whole")) as whole, LogitModel(bench.model("vocabulary")) as small:
        for token_ids in sequences:
            p = _exact_log_softmax(whole.logits([kept[token] for token in token_ids])[:, kept])
            q = _exact_log_softmax(small.logits(token_ids))
            values.append((np.exp(p) * (p - q)).sum(axis=1).mean())
    return float(np.mean(values))


def _exact_log_softmax(logits: Any) -> Any:
    """In float64: this is to show a zero."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def add_rows(
    bench: Bench,
    trimmed: dict[str, Any],
    exact: float,
    dense: dict[str, Any],
    cuts: dict[str, Any],
    rebuilt: dict[str, Any],
    recovered: dict[str, Any],
    peer: dict[str, Any],
    sparse: dict[str, Any],
    report: dict[str, Any],
    speeds: dict[str, Any],
) -> None:
    sizes = {name: path.stat().st_size / 1e6 for name, path in bench.eight_bit.items()}
    add = bench.add
    add(
        f"vocabulary {KEEP_TOKENS}: Q8_0 file",
        sizes["vocabulary"],
        sizes["whole"],
        "whole vocabulary",
        "MB",
        "<= 0.90",
        sizes["vocabulary"] <= 0.9 * sizes["whole"],
    )
    add(
        f"vocabulary {KEEP_TOKENS}: KL over the kept tokens",
        exact,
        0.0,
        "whole vocabulary",
        "nats/token",
        "< 1e-6",
        exact < 1e-6,
    )
    add(
        f"vocabulary {KEEP_TOKENS}: probability on tokens that are gone",
        trimmed["lost_mass"],
        1.0,
        "all",
        "ratio",
        "reported",
        True,
    )
    add(
        f"vocabulary {KEEP_TOKENS}: tokens for the same text",
        trimmed["longer_ratio"],
        1.0,
        "whole vocabulary",
        "ratio",
        "<= 1.05",
        trimmed["longer_ratio"] <= 1.05,
    )
    add(
        f"vocabulary {KEEP_TOKENS}: decode",
        speeds["vocabulary"]["decode"],
        speeds["whole"]["decode"],
        "whole vocabulary",
        "tokens/s",
        "faster",
        speeds["vocabulary"]["decode"] > speeds["whole"]["decode"],
    )
    add(
        f"width {KEEP_WIDTH}: KL, neurons by what cannot be made up for",
        cuts["width"]["kld_mean"],
        peer["kld_mean"],
        "by activations times weights, no make-up",
        "nats/token",
        "<= 0.7",
        cuts["width"]["kld_mean"] <= 0.7 * peer["kld_mean"],
    )
    for name, label in (("width", f"width {KEEP_WIDTH}"), ("depth", f"depth -{bench.drop_layers}")):
        add(
            f"{label}: Q8_0 file",
            sizes[name],
            sizes["vocabulary"],
            "before this cut",
            "MB",
            "smaller",
            sizes[name] < sizes["vocabulary"],
        )
        add(
            f"{label}: decode",
            speeds[name]["decode"],
            speeds["vocabulary"]["decode"],
            "before this cut",
            "tokens/s",
            "faster",
            speeds[name]["decode"] > speeds["vocabulary"]["decode"],
        )
        add(
            f"{label}: perplexity, not recovered",
            cuts[name]["perplexity"],
            dense["perplexity"],
            "before this cut",
            "perplexity",
            "reported",
            True,
        )
        add(
            f"{label}: same top, not recovered",
            cuts[name]["same_top_ratio"],
            1.0,
            "before this cut",
            "ratio",
            "reported",
            True,
        )
        if name in recovered:
            after, before = recovered[name], cuts[name]
            add(
                f"{label}: KL after reconstruction",
                rebuilt[name]["kld_mean"],
                before["kld_mean"],
                "not recovered",
                "nats/token",
                "reported",
                True,
            )
            add(
                f"{label}: KL after reconstruction and distillation",
                after["kld_mean"],
                rebuilt[name]["kld_mean"],
                "reconstructed",
                "nats/token",
                "reported",
                True,
            )
            # width: the cut itself has made up for most in closed form, so that less is left to recover
            most = 0.9 if name == "width" else 0.75
            add(
                f"{label}: KL after recovery",
                after["kld_mean"],
                before["kld_mean"],
                "not recovered",
                "nats/token",
                f"<= {most}",
                after["kld_mean"] <= most * before["kld_mean"],
            )
            if name == "width":
                add(
                    f"{label}: KL after recovery, against the simpler rule",
                    after["kld_mean"],
                    peer["kld_mean"],
                    "by activations times weights, no make-up",
                    "nats/token",
                    "<= 0.6",
                    after["kld_mean"] <= 0.6 * peer["kld_mean"],
                )
            add(
                f"{label}: perplexity after recovery",
                after["perplexity"],
                dense["perplexity"],
                "before this cut",
                "perplexity",
                "reported",
                True,
            )
            add(
                f"{label}: same top after recovery",
                after["same_top_ratio"],
                before["same_top_ratio"],
                "not recovered",
                "ratio",
                "reported",
                True,
            )
    add(
        "sparse 2:4: KL",
        sparse["kld_mean"],
        cuts["width"]["kld_mean"],
        f"width {KEEP_WIDTH}, not recovered",
        "nats/token",
        "reported",
        True,
    )
    for name, unit in (
        ("decode_tps", "tokens/s"),
        ("rss_bytes", "bytes"),
        ("bytes", "bytes"),
        ("compressed_bytes", "bytes"),
    ):
        add(
            f"sparse 2:4 on llama.cpp, Q4_0: {name}",
            report["sparse"][name],
            report["dense"][name],
            "dense twin",
            unit,
            "reported: " + ("gain" if name in report["gains"] else "no gain"),
            True,
        )


if __name__ == "__main__":
    main()
