"""Error feedback: it lowers what it is meant to lower, and writes ordinary blocks."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from slmops.build.feedback import curvature, loss, quantise_with_feedback
from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp.blocks import LAYOUTS, round_to
from slmops.runtimes.llama_cpp.quantise import dequantise_rows, quantise_rows

ROWS, COLUMNS = 40, 256


@pytest.fixture(scope="module")
def inputs() -> NDArray[np.float32]:
    """Correlated inputs with a few large ones, as hidden states have them."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((2000, 40)) @ rng.standard_normal((40, COLUMNS)) / 6
    values = mixed + 0.3 * rng.standard_normal((2000, COLUMNS))
    values[:, 7] *= 20
    return np.asarray(values, np.float32)


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    return np.random.default_rng(2).standard_normal((ROWS, COLUMNS)).astype(np.float32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_change_less_than_with_plain_rounding(
    name: str, rows: NDArray[np.float32], inputs: NDArray[np.float32]
) -> None:
    """At the same bytes, on inputs that it has not seen."""
    seen, unseen = inputs[:1500], inputs[1500:]
    hessian = seen.T @ seen / len(seen)
    plain = dequantise_rows(name, quantise_rows(name, rows, np.diag(hessian).copy()), COLUMNS)
    blob = quantise_with_feedback(name, rows, curvature(hessian))
    assert len(blob) == ROWS * COLUMNS // LAYOUTS[name].block_weights * LAYOUTS[name].block_bytes
    fed = dequantise_rows(name, blob, COLUMNS)

    def output_error(stored: NDArray[np.float32]) -> float:
        return float(np.square(unseen @ (stored - rows).T).mean())

    assert output_error(fed) < 0.75 * output_error(plain)


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_correlation_it_is_plain_rounding(name: str, rows: NDArray[np.float32]) -> None:
    """A diagonal H has nothing to feed back: the bytes are those of rounding with the same scales."""
    layout = LAYOUTS[name]
    known = curvature(np.eye(COLUMNS, dtype=np.float32))
    blob = quantise_with_feedback(name, rows, known)
    blocks = rows.reshape(-1, layout.block_weights)  # scales are searched for one block at a time
    ggml = np.frombuffer(quantise_rows(name, blocks, known.weights[: layout.block_weights]), dtype=np.uint8)
    expected = round_to(name, ggml.reshape(-1, layout.block_bytes), blocks)
    assert blob == expected.tobytes()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "IQ4_NL", "Q4_K", "Q6_K"])
def test_scales_of_an_earlier_release_are_kept(
    name: str, rows: NDArray[np.float32], inputs: NDArray[np.float32]
) -> None:
    """A slightly changed matrix with frozen scales: every scale byte stays, few codes change, the loss hardly grows."""
    layout = LAYOUTS[name]
    hessian = inputs.T @ inputs / len(inputs)
    known = curvature(hessian)
    old = quantise_with_feedback(name, rows, known)
    changed = rows + np.random.default_rng(3).standard_normal(rows.shape).astype(np.float32) * 0.003
    frozen = quantise_with_feedback(name, changed, known, scales_from=old)
    free = quantise_with_feedback(name, changed, known)
    before, after = (np.frombuffer(b, dtype=np.uint8).reshape(-1, layout.block_bytes) for b in (old, frozen))
    for was, now in zip(layout.read(before), layout.read(after), strict=True):
        assert was is now is None or np.array_equal(was, now)  # type: ignore[arg-type]
    costs = [
        float(loss(dequantise_rows(name, blob, COLUMNS) - changed, hessian).sum()) for blob in (frozen, free)
    ]
    assert costs[0] < 1.15 * costs[1]
    with pytest.raises(BuildError, match="scales_from: expected"):
        quantise_with_feedback(name, changed, known, scales_from=old[:-1])


def test_many_rows_are_the_same_as_few(inputs: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows do not know of each other, so cutting them into chunks changes nothing but rounding of sums."""
    rows = np.random.default_rng(5).standard_normal((30, COLUMNS)).astype(np.float32)
    known = curvature(inputs.T @ inputs / len(inputs))
    whole = dequantise_rows("Q4_0", quantise_with_feedback("Q4_0", rows, known), COLUMNS)
    monkeypatch.setattr("slmops.build.feedback._ROWS_AT_ONCE", 7)
    parts = dequantise_rows("Q4_0", quantise_with_feedback("Q4_0", rows, known), COLUMNS)
    assert (whole == parts).mean() > 0.99


def test_the_factorisation_is_the_inverse(inputs: NDArray[np.float32]) -> None:
    """Carry and weights together are the Cholesky factor of the damped H's inverse."""
    hessian = inputs.T.astype(np.float64) @ inputs / len(inputs)
    known = curvature(hessian, 0.01)
    factor = known.carry / np.sqrt(known.weights)[:, None]
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(COLUMNS)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(COLUMNS), atol=1e-3)


def test_inputs_that_never_vary_or_are_broken() -> None:
    """No inputs at all leave plain rounding; NaN is refused; a slightly indefinite H is damped until it is not."""
    nothing = curvature(np.zeros((64, 64)))
    np.testing.assert_array_equal(nothing.carry, np.eye(64))
    with pytest.raises(BuildError, match="not finite"):
        curvature(np.full((64, 64), np.nan))
    indefinite = np.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    assert np.isfinite(curvature(indefinite).carry).all()


def test_few_tokens_do_not_mislead(rows: NDArray[np.float32]) -> None:
    """Inputs without correlation, seen few times: H shows correlations that are not there, and shrinking keeps them small."""
    values = np.random.default_rng(6).standard_normal((4000, COLUMNS)).astype(np.float32)
    few, unseen = values[:200], values[500:]
    hessian = few.T @ few / len(few)

    def output_error(blob: bytes) -> float:
        return float(np.square(unseen @ (dequantise_rows("Q4_0", blob, COLUMNS) - rows).T).mean())

    plain = output_error(quantise_rows("Q4_0", rows, np.diag(hessian).copy()))
    trusting = output_error(quantise_with_feedback("Q4_0", rows, curvature(hessian)))
    shrunk = output_error(quantise_with_feedback("Q4_0", rows, curvature(hessian, tokens=len(few))))
    assert shrunk < 0.7 * trusting
    assert shrunk < 1.5 * plain
