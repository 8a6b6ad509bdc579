"""Gradients projected on errors: equal to the definition, right where KFAC is not, and the step's file in between."""

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
from slmops.train.fisher import Outputs, packed, passes  # noqa: E402
from slmops.train.gradients import project  # noqa: E402
from slmops.train.llama import Llama, load_llama  # noqa: E402
from slmops.train.projected import RowErrors, projected  # noqa: E402

RNG = np.random.default_rng(0)
SEQUENCES = [[int(t) for t in RNG.integers(0, 256, length)] for length in (40, 17, 64, 30)] * 6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("projected") / "tiny.gguf", seed=3, scale=0.8)


@pytest.fixture(scope="module")
def llama(path: Path) -> Llama:
    return load_llama(path, torch.float32)


def all_rows(errors: Any, kind: str = "Q4_0") -> RowErrors:
    """Every row of one matrix, each for itself."""
    values = errors.numpy()[None]
    return RowErrors((kind,), np.arange(values.shape[1]), np.ones(values.shape[1]), values)


def logprobs(llama: Llama) -> Any:
    rows = []
    with torch.no_grad():
        for ids, positions, mask in packed(SEQUENCES):
            rows.append(torch.log_softmax(llama.logits(llama.hidden(ids, positions, mask)), dim=-1))
    return torch.cat(rows)


def test_projections_predict_what_errors_really_cost(llama: Llama) -> None:
    """Errors of random size in every matrix, output and embedding among them: prediction against measured divergence."""
    before = logprobs(llama)
    chance = torch.Generator().manual_seed(2)
    names = sorted(name for name, weight in llama.weights.items() if weight.ndim == 2)
    errors = {
        name: torch.randn(llama.weights[name].shape, generator=chance)
        * llama.weights[name].std()
        * (0.02, 0.05, 0.1)[index % 3]
        for index, name in enumerate(names)
    }
    found = projected(llama, SEQUENCES, {name: all_rows(error) for name, error in errors.items()}, seed=1)
    measured = []
    for name in names:
        weight = llama.weights[name]
        llama.weights[name] = weight + errors[name]
        llama.output = llama.weights.get("output.weight", llama.weights["token_embd.weight"])
        after = logprobs(llama)
        llama.weights[name] = weight
        llama.output = llama.weights.get("output.weight", llama.weights["token_embd.weight"])
        measured.append(float((before.exp() * (before - after)).sum(-1).mean()))
    predicted = [found[name]["Q4_0"] for name in names]
    correlation = rank_correlation(predicted, measured)
    assert correlation is not None and correlation > 0.9
    ratio = np.array(predicted) / np.array(measured)
    assert 0.5 < np.median(ratio) < 2.0


def test_a_layers_projection_is_the_sum_over_texts(llama: Llama) -> None:
    """Against autograd by the weight itself, text by text, with the same sampled targets."""
    name = "blk.0.ffn_down.weight"
    error = torch.randn(llama.weights[name].shape, generator=torch.Generator().manual_seed(3)) * 0.01
    few = SEQUENCES[:2]  # side by side in one packed row
    rows = RowErrors(
        ("a", "b"), np.array([1, 4]), np.array([2.0, 5.0]), torch.stack([error[[1, 4]]] * 2).numpy()
    )
    found = projected(llama, few, {name: rows}, seed=9)[name]
    (ids, positions, mask), *_ = packed(few)
    chances = next(iter(passes(llama, few, 9, Outputs(llama)))).chances
    targets = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(9))
    weight = llama.weights[name]
    total = 0.0
    for text in (slice(0, len(few[0])), slice(len(few[0]), None)):
        leaf = weight.clone().requires_grad_()
        llama.weights[name] = leaf
        likelihood = torch.log_softmax(llama.logits(llama.hidden(ids, positions, mask)), -1).gather(
            1, targets
        )
        torch.autograd.backward(likelihood[text].sum())
        llama.weights[name] = weight
        assert leaf.grad is not None
        for row, stands_for in ((1, 2.0), (4, 5.0)):
            total += 0.5 * stands_for * float((leaf.grad[row] * error[row]).sum()) ** 2 / len(ids)
    assert found["a"] == pytest.approx(total, rel=1e-3)
    assert found["a"] == found["b"]


def test_the_step_reads_what_the_predictions_kept(path: Path, tmp_path: Path) -> None:
    """Errors in float16 in units of their own; plain rounding apart; without gradients it passes the reason on."""
    from slmops.build.steps.predicted import PROBE, _ErrorFile, _Told

    text = tmp_path / "text.json"
    text.write_text(json.dumps(SEQUENCES[:4]))
    name = "blk.1.ffn_up.weight"
    errors = (RNG.standard_normal((2, 3, 64)) * 1e-6).astype(np.float32)
    width = load_llama(path, torch.float32).weights[name].shape[1]
    errors = np.resize(errors, (2, 3, width)).astype(np.float32)
    kept = _ErrorFile(tmp_path / "errors.npz")
    kept.add(
        name, _Told(np.array([0, 5, 9]), np.array([1.0, 3.0, 3.0]), {}, {"Q4_0": errors[0], PROBE: errors[1]})
    )
    kept.close()
    context = SimpleNamespace(
        files={"model": path, "text": text, "errors-1": tmp_path / "errors.npz"},
        values={"gradients-facts": {"available": True}},
        params={"tokens": 100, "seed": 5},
        out=tmp_path,
        progress=lambda ratio, note: None,
    )
    told = project(context)
    assert told["available"] and told["tokens"] == 100
    llama = load_llama(path, torch.float32)
    exact = RowErrors(("Q4_0", PROBE), np.array([0, 5, 9]), np.array([1.0, 3.0, 3.0]), errors)
    cut = [SEQUENCES[0], SEQUENCES[1], SEQUENCES[2][: 100 - 57]]
    expected = projected(llama, cut, {name: exact}, seed=5)[name]
    assert told["kld"][name] == {"Q4_0": pytest.approx(expected["Q4_0"], rel=0.01)}
    assert told["probe"][name] == pytest.approx(expected[PROBE], rel=0.01)
    assert told == project(context)
    context.values = {"gradients-facts": {"available": False, "reason": "architecture is not llama"}}
    assert project(context) == {
        "available": False,
        "reason": "architecture is not llama",
        "tokens": 0,
        "kld": {},
        "probe": {},
    }
