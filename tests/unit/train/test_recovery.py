"""Recovery: losses are what they say, cut models come closer to the dense one, and a stopped run goes on to the same bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.teacher import keep
from slmops.build.structure import Structure, cut
from slmops.core.errors import BaseModelError, BuildError
from slmops.runtimes.llama_cpp.logits import LogitModel

torch = pytest.importorskip("torch")

from slmops.train.distil import Distillation, Teacher, bucket_divergence, distil  # noqa: E402 - after the skip
from slmops.train.llama import load_llama  # noqa: E402
from slmops.train.reconstruct import reconstruct, segments  # noqa: E402
from slmops.train.steps import distil as distil_step  # noqa: E402
from slmops.train.steps import reconstruct as reconstruct_step  # noqa: E402
from slmops.train.students import text_rows, write_weights  # noqa: E402

LAYERS = 3


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_tiny_gguf(tmp_path / "dense.gguf", seed=6, layers=LAYERS, ffn=512)


@pytest.fixture
def sequences() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(32, 127, 40).tolist() for _ in range(60)]


def narrower(dense: Path, path: Path) -> Path:
    """Half of the neurons, without making up for the others: something to recover from."""
    neurons = {layer: tuple(range(0, 512, 2)) for layer in range(LAYERS)}
    with open_gguf(dense) as model:
        cut(path, model, Structure(neurons=neurons))
    return path


def step(out: Path, files: dict[str, Path], checkpoints: Path | None = None, **params: Any) -> StepContext:
    out.mkdir(parents=True, exist_ok=True)
    return StepContext(files, {}, params, out, lambda ratio, note: None, checkpoints=checkpoints)


def teacher_of(dense: Path, sequences: list[list[int]], folder: Path) -> dict[str, Path]:
    (folder / "text.json").write_text(str(sequences[:-8]))
    (folder / "watch.json").write_text(str(sequences[-8:]))
    files = {"model": dense, "text": folder / "text.json", "watch": folder / "watch.json"}
    value = keep(step(folder / "t", files, tokens=10**6))
    assert value["tokens"] == sum(map(len, sequences))
    return {
        "text": folder / "text.json",
        "watch": folder / "watch.json",
        "ids": folder / "t" / "ids.npy",
        "logprobs": folder / "t" / "logprobs.npy",
    }


def test_text_that_a_student_was_not_fitted_to_comes_first(
    dense: Path, sequences: list[list[int]], tmp_path: Path
) -> None:
    """On text that it was fitted to it looks better than it is; where nothing else is left, that serves again."""
    (tmp_path / "text.json").write_text(str(sequences[:-8]))
    (tmp_path / "watch.json").write_text(str(sequences[-8:]))
    files = {"model": dense, "text": tmp_path / "text.json", "watch": tmp_path / "watch.json"}
    keep(step(tmp_path / "some", files, tokens=len(sequences[0]) * 3, fitted_tokens=len(sequences[0]) * 2))
    assert json.loads((tmp_path / "some" / "learn.json").read_text()) == sequences[2:5]
    value = keep(step(tmp_path / "all", files, tokens=10**6, fitted_tokens=len(sequences[0]) * 2))
    assert json.loads((tmp_path / "all" / "learn.json").read_text()) == sequences[2:-8] + sequences[:2]
    assert value["tokens"] == sum(map(len, sequences))


# ---- the loss -------------------------------------------------------------------------------------------------------


def exact_divergence(p: Any, q: Any) -> Any:
    return (p.exp() * (p - q)).sum(-1)


def test_with_all_tokens_kept_it_is_the_divergence() -> None:
    torch.manual_seed(1)
    teacher, student = torch.randn(5, 30).log_softmax(-1), torch.randn(5, 30)
    ids = torch.arange(30).expand(5, 30)
    assert torch.allclose(
        bucket_divergence(student, ids, teacher),
        exact_divergence(teacher, student.log_softmax(-1)),
        atol=1e-5,
    )


def test_the_rest_is_a_bucket_and_not_forgotten() -> None:
    """By hand over k + 1 outcomes; below the whole divergence; never negative; zero for an equal student."""
    torch.manual_seed(2)
    teacher, student = (torch.randn(50, 40) * 2).log_softmax(-1), torch.randn(50, 40) * 2
    kept, ids = teacher.topk(6, dim=-1)
    ours = student.log_softmax(-1)
    merged_p = torch.cat([kept.exp(), 1 - kept.exp().sum(-1, keepdim=True)], -1)
    q = ours.gather(-1, ids).exp()
    merged_q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    found = bucket_divergence(student, ids, kept)
    assert torch.allclose(found, (merged_p * (merged_p / merged_q).log()).sum(-1), atol=1e-4)
    assert (found <= exact_divergence(teacher, ours) + 1e-5).all()
    assert (found >= -1e-6).all()
    assert bucket_divergence(teacher, ids, kept).abs().max() < 1e-5


def test_top_k_alone_would_teach_that_the_rest_never_comes() -> None:
    """The gradient pushes mass out of the rest only as far as the teacher's rest goes."""
    teacher = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]]).log()
    ids = torch.tensor([[0, 1]])
    student = torch.zeros(1, 5, requires_grad=True)
    for _ in range(2000):
        bucket_divergence(student, ids, teacher[:, :2]).sum().backward()
        with torch.no_grad():
            student -= 0.5 * student.grad
            student.grad.zero_()
    assert torch.allclose(student.softmax(-1), teacher.exp(), atol=1e-3)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_rows_are_as_sequences_alone(dense: Path, sequences: list[list[int]]) -> None:
    """Packed or alone, and as the engine computes it."""
    rows = text_rows(sequences[:5], 90)
    assert [len(row.tokens) for row in rows] == [80, 80, 40]
    assert torch.cat([row.places for row in rows]).tolist() == list(range(200))
    llama = load_llama(dense)
    row = rows[1]
    with torch.no_grad():
        packed = llama.logits(llama.hidden(row.tokens, row.positions, row.mask))
    with LogitModel(dense) as engine:
        expected = np.concatenate([engine.logits(sequences[2]), engine.logits(sequences[3])])
    assert np.allclose(
        packed.log_softmax(-1).numpy(), torch.from_numpy(expected).log_softmax(-1).numpy(), atol=0.05
    )


@pytest.mark.parametrize(
    ("kept", "expected"),
    [([0, 1, 2], [[0], [1], [2]]), ([0, 2], [[0, 1], [2]]), ([1, 2], [[0, 1], [2]]), ([0], [[0, 1, 2]])],
)
def test_a_block_stands_for_those_that_went(kept: list[int], expected: list[list[int]]) -> None:
    assert [list(part) for part in segments(kept, 3)] == expected


# ---- recovery -------------------------------------------------------------------------------------------------------


def divergence(dense: Path, other: Path, sequences: list[list[int]]) -> float:
    total = []
    with LogitModel(dense) as one, LogitModel(other) as two:
        for sequence in sequences:
            p = torch.from_numpy(one.logits(sequence)).log_softmax(-1)
            q = torch.from_numpy(two.logits(sequence)).log_softmax(-1)
            total.append(float(exact_divergence(p, q).mean()))
    return sum(total) / len(total)


def test_blocks_come_closer(dense: Path, sequences: list[list[int]], tmp_path: Path) -> None:
    """As a step, with a dropped block: error and divergence fall, and the file is the cut model's but for its weights."""
    narrow = narrower(dense, tmp_path / "narrow.gguf")
    cuts = [Structure(neurons={0: (0,)}), Structure(layers=(0, 2))]
    with open_gguf(narrow) as model:
        cut(tmp_path / "cut.gguf", model, cuts[1])
    files = {"model": tmp_path / "cut.gguf", "teacher": dense, "text": tmp_path / "text.json"}
    files["text"].write_text(str(sequences[:-8]))
    files["watch"] = tmp_path / "watch.json"
    files["watch"].write_text(str(sequences[-8:]))
    for index, structure in enumerate(cuts):
        files[f"structure-{index}"] = tmp_path / f"s{index}.json"
        files[f"structure-{index}"].write_bytes(structure.encode())
    value = reconstruct_step(step(tmp_path / "out", files, tokens=2400))
    assert value["blocks"] == 2
    assert value["error_after"] < 0.9 * value["error_before"]
    before = divergence(dense, tmp_path / "cut.gguf", sequences[:8])
    assert divergence(dense, tmp_path / "out" / "model.gguf", sequences[:8]) < before
    assert (tmp_path / "out" / "model.gguf").stat().st_size == (tmp_path / "cut.gguf").stat().st_size


def test_what_does_not_help_is_not_kept(dense: Path, sequences: list[list[int]]) -> None:
    """Reconstructing an uncut model: nothing is lacking, so nothing changes."""
    student, same = load_llama(dense), load_llama(dense)
    value = reconstruct(student, same, [0, 1, 2], sequences[:20], sequences[-4:])
    assert value["improved_blocks"] == 0
    assert value["verdict"].startswith("no block came closer")
    assert value["error_after"] == value["error_before"] == 0
    assert all(torch.equal(student.weights[name], weight) for name, weight in same.weights.items())


def test_reconstruction_goes_on_where_it_was_stopped(
    dense: Path, sequences: list[list[int]], tmp_path: Path
) -> None:
    """After one block of three: the same weights and figures as in one go, and the first block is not fitted again."""
    narrow = narrower(dense, tmp_path / "narrow.gguf")
    whole, straight = load_llama(dense), load_llama(narrow)
    value = reconstruct(straight, whole, [0, 1, 2], sequences[:-8], sequences[-8:])
    path = tmp_path / "c" / "state.pt"
    part = reconstruct(
        load_llama(narrow), whole, [0, 1, 2], sequences[:-8], sequences[-8:], checkpoint=path, stop_after=1
    )
    assert part["improved_blocks"] == 1
    resumed = load_llama(narrow)
    assert reconstruct(resumed, whole, [0, 1, 2], sequences[:-8], sequences[-8:], checkpoint=path) == value
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in straight.weights.items())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_distillation_comes_closer(
    dense: Path, sequences: list[list[int]], tmp_path: Path, method: str
) -> None:
    """As a step: divergence falls on rows that were not learned from, and for the engine; the same bytes again."""
    student = narrower(dense, tmp_path / "narrow.gguf")
    files = {"model": student, **teacher_of(dense, sequences, tmp_path)}
    asked = {"method": method, "rank": 4, "epochs": 6, "learning_rate": 5e-4}
    asked |= {"seed": 3, "keep_zeros": False, "tokens": 10**6}
    value = distil_step(step(tmp_path / "one", files, **asked))
    assert value["divergence_after"] < 0.9 * value["divergence_before"]
    assert re.match(r"\d\d\.\d% closer to its teacher", value["verdict"])
    unseen = [np.random.default_rng(9).integers(32, 127, 40).tolist() for _ in range(5)]
    before = divergence(dense, student, unseen)
    assert divergence(dense, tmp_path / "one" / "model.gguf", unseen) < before
    distil_step(step(tmp_path / "two", files, **asked))
    assert (tmp_path / "one" / "model.gguf").read_bytes() == (tmp_path / "two" / "model.gguf").read_bytes()


def test_a_stopped_run_goes_on_to_the_same_weights(
    dense: Path, sequences: list[list[int]], tmp_path: Path
) -> None:
    """Stopped in the middle of an epoch, after a look; and a checkpoint of other settings is not taken up."""
    kept = teacher_of(dense, sequences, tmp_path)
    student = narrower(dense, tmp_path / "narrow.gguf")
    teacher = Teacher(np.load(kept["ids"]), np.load(kept["logprobs"]))
    settings = Distillation(epochs=3, learning_rate=1e-3)
    straight, value = distil(load_llama(student), teacher, sequences[:-8], sequences[-8:], settings)
    path = tmp_path / "c" / "state.pt"
    _, part = distil(
        load_llama(student), teacher, sequences[:-8], sequences[-8:], settings, checkpoint=path, stop_after=7
    )
    assert path.exists()
    assert part["steps"] == 7
    resumed, again = distil(
        load_llama(student), teacher, sequences[:-8], sequences[-8:], settings, checkpoint=path
    )
    assert again == value
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    other = Distillation(epochs=3, learning_rate=1e-3, seed=8)
    fresh, _ = distil(load_llama(student), teacher, sequences[:-8], sequences[-8:], other)
    ignoring, _ = distil(load_llama(student), teacher, sequences[:-8], sequences[-8:], other, checkpoint=path)
    assert all(torch.equal(fresh[name], ignoring[name]) for name in fresh)


def test_zeros_stay_zero(dense: Path, sequences: list[list[int]], tmp_path: Path) -> None:
    """After sparsify, training does not fill them up."""
    llama = load_llama(dense)
    name = "blk.1.ffn_up.weight"
    llama.weights[name] = llama.weights[name] * (torch.arange(64) % 2)
    kept = teacher_of(dense, sequences, tmp_path)
    teacher = Teacher(np.load(kept["ids"]), np.load(kept["logprobs"]))
    weights, value = distil(
        llama,
        teacher,
        sequences[:-8],
        sequences[-8:],
        Distillation(epochs=6, learning_rate=5e-4, keep_zeros=True),
    )
    assert value["best_step"] > 0
    assert (weights[name][:, ::2] == 0).all()
    assert (weights[name][:, 1::2] != 0).all()


# ---- the file -------------------------------------------------------------------------------------------------------


def test_writing_weights_back(dense: Path, tmp_path: Path) -> None:
    """Named tensors change, the rest of the file does not; wrong shapes and values beyond F16 are refused by name."""
    llama = load_llama(dense)
    name = "blk.0.attn_q.weight"
    write_weights(dense, tmp_path / "same.gguf", llama.weights)
    assert (tmp_path / "same.gguf").read_bytes() == dense.read_bytes()
    write_weights(dense, tmp_path / "new.gguf", {name: llama.weights[name] * 2})
    assert torch.allclose(load_llama(tmp_path / "new.gguf").weights[name], llama.weights[name] * 2, rtol=1e-3)
    with pytest.raises(BaseModelError, match=r"blk\.0\.attn_q\.weight is F16 \(64, 64\)"):
        write_weights(dense, tmp_path / "x.gguf", {name: torch.zeros(3, 64)})
    with pytest.raises(BaseModelError, match="nothing is missing"):
        write_weights(dense, tmp_path / "x.gguf", {"nothing": torch.zeros(3, 64)})
    with pytest.raises(BuildError, match="beyond the range of F16"):
        write_weights(dense, tmp_path / "x.gguf", {name: llama.weights[name] * 1e9})
