"""Second moments of gradients: equal to the definition, and they rank what errors really cost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support.tiny_model import make_tiny_gguf

torch = pytest.importorskip("torch")

from slmops.core.search.sensitivity import rank_correlation  # noqa: E402
from slmops.train.fisher import moments, packed  # noqa: E402
from slmops.train.gradients import collect  # noqa: E402
from slmops.train.llama import Llama, load_llama  # noqa: E402

RNG = np.random.default_rng(0)
SEQUENCES = [[int(t) for t in RNG.integers(0, 256, length)] for length in (40, 17, 64, 30)] * 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    path = make_tiny_gguf(tmp_path_factory.mktemp("fisher") / "tiny.gguf", seed=3, scale=0.8)
    return load_llama(path, torch.float32)


def logprobs(llama: Llama) -> Any:
    rows = []
    with torch.no_grad():
        for ids, positions, mask in packed(SEQUENCES):
            rows.append(torch.log_softmax(llama.logits(llama.hidden(ids, positions, mask)), dim=-1))
    return torch.cat(rows)


def test_packing_keeps_sequences_apart(llama: Llama) -> None:
    """Side by side in a row, each sequence has the distributions that it has alone."""
    together = logprobs(llama)[: len(SEQUENCES[0])]
    ids = torch.tensor(SEQUENCES[0])
    alone = llama.hidden(ids, torch.arange(len(ids)), torch.ones(len(ids), len(ids), dtype=torch.bool).tril())
    torch.testing.assert_close(together, torch.log_softmax(llama.logits(alone), -1), atol=1e-4, rtol=1e-4)


def test_predictions_rank_what_errors_really_cost(llama: Llama) -> None:
    """Errors of random size in every matrix: 1/2 sum E[g^2] D H D' against the measured divergence."""
    found = moments(llama, SEQUENCES, seed=1)
    assert found.tokens == sum(map(len, SEQUENCES))
    assert found.token_share.sum() == pytest.approx(1.0)
    before = logprobs(llama)
    inputs = _inputs(llama)
    chance = torch.Generator().manual_seed(2)
    predicted, measured = [], []
    for index, name in enumerate(sorted(n for n in found.rows if n.startswith("blk."))):
        weight = llama.weights[name]
        error = torch.randn(weight.shape, generator=chance) * weight.std() * (0.02, 0.05, 0.1)[index % 3]
        cost = torch.einsum("ij,jk,ik->i", error, inputs[name], error)
        predicted.append(0.5 * float((torch.from_numpy(found.rows[name]) * cost).sum()))
        llama.weights[name] = weight + error
        after = logprobs(llama)
        llama.weights[name] = weight
        measured.append(float((before.exp() * (before - after)).sum(-1).mean()))
    correlation = rank_correlation(predicted, measured)
    assert correlation is not None and correlation > 0.9
    ratio = np.array(predicted) / np.array(measured)
    assert 0.4 < np.median(ratio) < 2.5


def _inputs(llama: Llama) -> dict[str, Any]:
    """E[x x'] of every layer, through the same hook that the trainer has."""
    sums: dict[str, Any] = {}

    class Watch:
        def delta(self, name: str, x: Any) -> None:
            key = name + ".weight"
            sums[key] = sums.get(key, 0) + x.detach().T @ x.detach()

    count = 0
    with torch.no_grad():
        for ids, positions, mask in packed(SEQUENCES):
            llama.hidden(ids, positions, mask, Watch())
            count += len(ids)
    return {name: total / count for name, total in sums.items()}


def test_the_step_gives_equal_files_for_equal_seeds(tmp_path: Path) -> None:
    """And says so when it cannot read the architecture, instead of failing the build."""
    model = make_tiny_gguf(tmp_path / "tiny.gguf", seed=3)
    text = tmp_path / "text.json"
    text.write_text(json.dumps(SEQUENCES))
    results = []
    for name in ("a", "b"):
        out = tmp_path / name
        out.mkdir()
        context = SimpleNamespace(
            files={"model": model, "text": text},
            params={"tokens": 100, "seed": 5},
            out=out,
            progress=lambda ratio, note: None,
        )
        assert collect(context) == {"available": True, "tokens": 100}
        results.append((out / "gradients.npz").read_bytes())
    assert results[0] == results[1]
    other = model.read_bytes().replace(b"llama.block_count", b"lamas.block_count")
    (tmp_path / "other.gguf").write_bytes(other)
    told = collect(
        SimpleNamespace(
            files={"model": tmp_path / "other.gguf", "text": text},
            params={"tokens": 100, "seed": 5},
            out=tmp_path / "a",
            progress=lambda ratio, note: None,
        )
    )
    assert told["available"] is False and "llama.block_count" in told["reason"]
