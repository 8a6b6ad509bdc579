"""Width and depth: what goes is what is missed least, the rest makes up for it, header and names agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tests.support.tiny_model import make_tiny_gguf

from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.prune_blocks import depth, narrow, width
from slmops.build.steps.prune_check import check, follow
from slmops.build.structure import Structure, cut
from slmops.core.errors import BaseModelError, BuildError, UsageError
from slmops.runtimes.llama_cpp.activations import collect_moments
from slmops.runtimes.llama_cpp.imatrix import collect_imatrix
from slmops.runtimes.llama_cpp.logits import LogitModel

TEXT = [list(b"turn on the light in the kitchen"), list(b"what is the weather like in Turku today")]


def context(out: Path, files: dict[str, Path], **params: Any) -> StepContext:
    out.mkdir(parents=True)
    return StepContext(files, {}, params, out, lambda ratio, note: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_gguf(tmp_path / "model.gguf", seed=4, layers=4, ffn=512)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.json").write_text(json.dumps(TEXT))
    return tmp_path / "text.json"


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def number(path: Path, key: str) -> int:
    field = GGUFReader(path).get_field(key)
    assert field is not None
    return int(field.contents())


# ---- the arithmetic of narrowing ------------------------------------------------------------------------------------


def layer(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (8, 64), and activations (400, 64) of which half are made of the other half."""
    rng = np.random.default_rng(seed)
    free = rng.standard_normal((400, 32))
    made = free @ rng.standard_normal((32, 32)) * 0.5
    return rng.standard_normal((8, 64)).astype(np.float32), np.hstack([free, made]).astype(np.float32)


def test_what_the_others_can_make_is_not_missed() -> None:
    """64 neurons that span 32 dimensions: half can go, and next to nothing is lost."""
    rows, activations = layer(1)
    second = activations.T @ activations
    kept, new, lost = narrow(rows, second, 32, second)
    assert len(kept) == 32
    assert new.shape == (8, 32)
    assert lost < 0.01
    difference = activations[:, list(kept)] @ new.T - activations @ rows.T
    assert (difference**2).sum() / ((activations @ rows.T) ** 2).sum() == pytest.approx(lost, rel=0.05)


def test_other_text_says_how_much_to_make_up() -> None:
    """From a sample of hardly more tokens than neurons, what fits that sample best is not what is best."""
    rng = np.random.default_rng(3)
    mixing = rng.standard_normal((64, 64)) * np.exp(rng.standard_normal(64))
    few, others, many = (
        (rng.standard_normal((count, 64)) @ mixing + 3 * rng.standard_normal((count, 64))).astype(np.float32)
        for count in (70, 70, 5000)
    )
    rows = rng.standard_normal((8, 64)).astype(np.float32)

    def loss(kept: tuple[int, ...], new: np.ndarray) -> float:
        exact = many @ rows.T
        return float(((many[:, list(kept)] @ new.T - exact) ** 2).sum() / (exact**2).sum())

    blind = narrow(rows, few.T @ few, 40, few.T @ few)
    watched = narrow(rows, few.T @ few, 40, others.T @ others)
    assert blind[2] < watched[2]  # what it says of itself
    assert loss(*watched[:2]) < loss(*blind[:2])  # what is so


@pytest.mark.parametrize("seed", range(3))
def test_better_than_size_of_weights_and_than_no_make_up(seed: int) -> None:
    """Against the two simpler rules, at the same width, measured on the activations."""
    rng = np.random.default_rng(seed)
    activations = (rng.standard_normal((600, 64)) * np.exp(rng.standard_normal(64) * 1.5)).astype(np.float32)
    rows = rng.standard_normal((8, 64)).astype(np.float32)
    exact = activations @ rows.T

    def loss(kept: list[int], new: np.ndarray) -> float:
        return float(((activations[:, kept] @ new.T - exact) ** 2).sum() / (exact**2).sum())

    kept, new, _ = narrow(rows, activations.T @ activations, 48)
    by_size = sorted(np.argsort((rows**2).sum(axis=0))[-48:].tolist())
    assert loss(list(kept), new) <= loss(list(kept), rows[:, list(kept)]) + 1e-9
    assert loss(list(kept), new) < 0.5 * loss(by_size, rows[:, by_size])


def test_dead_neurons_go_first() -> None:
    """Whatever the size of their weights; a layer that never fires stays finite."""
    rows, activations = layer(2)
    activations = np.random.default_rng(9).standard_normal(activations.shape).astype(np.float32)
    activations[:, 5:15] = 0
    rows[:, 5:15] *= 100
    kept, _, _ = narrow(rows, activations.T @ activations, 54)
    assert set(kept).isdisjoint(range(5, 15))
    _, new, lost = narrow(rows, np.zeros((64, 64), np.float32), 32)
    assert np.isfinite(new).all()
    assert lost == 0.0


# ---- activations ----------------------------------------------------------------------------------------------------


def test_second_moments_agree_with_the_importance_matrix(model: Path) -> None:
    """Their diagonal is what the importance matrix sums, for every position of every block."""
    name = "blk.3.ffn_down.weight"
    moments = collect_moments(model, TEXT[:1], [name])[name]
    means = collect_imatrix(model, TEXT[0], window_tokens=len(TEXT[0])).sums
    assert moments.shape == (512, 512)
    # the last block's importance is seen at the positions whose logits were asked for: all of them
    assert np.allclose(np.diag(moments) / len(TEXT[0]), means[name], rtol=1e-3, atol=1e-7)
    assert np.allclose(moments, moments.T, atol=1e-4)


def test_a_weight_that_is_not_there(model: Path) -> None:
    with pytest.raises(BuildError, match=r"no product with blk\.9\.ffn_down"):
        collect_moments(model, TEXT, ["blk.9.ffn_down.weight"])


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_width(model: Path, text: Path, tmp_path: Path) -> None:
    """Rows and columns of the same neurons; the engine loads it, predictions are close; the same bytes twice."""
    asked = {"keep_ffn_width": 256, "moment_tokens": 64, "probe_tokens": 40}
    value = width(context(tmp_path / "one", {"model": model, "text": text}, **asked))
    assert (value["ffn_before"], value["ffn"]) == (512, 256)
    assert number(tmp_path / "one" / "model.gguf", "llama.feed_forward_length") == 256
    before, after = tensors(model), tensors(tmp_path / "one" / "model.gguf")
    structure = Structure.decode((tmp_path / "one" / "structure.json").read_bytes())
    for block in range(4):
        kept = list(structure.neurons[block])
        for name in ("ffn_gate", "ffn_up"):
            assert np.array_equal(
                after[f"blk.{block}.{name}.weight"], before[f"blk.{block}.{name}.weight"][kept]
            )
        assert after[f"blk.{block}.ffn_down.weight"].shape == (64, 256)
    assert value["kld"] < 0.2
    assert value["lost_ratio"] <= value["worst_lost_ratio"] < 0.5
    width(context(tmp_path / "two", {"model": model, "text": text}, **asked))
    assert (tmp_path / "one" / "model.gguf").read_bytes() == (tmp_path / "two" / "model.gguf").read_bytes()


def test_depth_drops_the_block_that_does_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    """A block whose outputs are next to zero is the first to go; names and count close up; the engine agrees."""
    idle = make_idle(model, tmp_path / "idle.gguf", 2)
    value = depth(
        context(
            tmp_path / "out", {"model": idle, "text": text}, drop_layers=2, probe_tokens=60, screen_tokens=20
        )
    )
    assert value["dropped"][0]["layer"] == 2
    assert value["dropped"][0]["kld"] < 1e-4 < value["dropped"][1]["kld"]
    assert value["kld"] == pytest.approx(value["dropped"][1]["kld"], rel=1e-3)
    assert number(tmp_path / "out" / "model.gguf", "llama.block_count") == 2
    structure = Structure.decode((tmp_path / "out" / "structure.json").read_bytes())
    before, after = tensors(idle), tensors(tmp_path / "out" / "model.gguf")
    assert structure.layers is not None
    assert {name for name in after if name.startswith("blk.")} == {
        name.replace(f"blk.{old}.", f"blk.{new}.")
        for new, old in enumerate(structure.layers)
        for name in before
        if name.startswith(f"blk.{old}.")
    }
    for new, old in enumerate(structure.layers):
        assert np.array_equal(after[f"blk.{new}.attn_q.weight"], before[f"blk.{old}.attn_q.weight"])
    with LogitModel(tmp_path / "out" / "model.gguf") as engine:
        assert engine.n_layers == 2
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def make_idle(source: Path, path: Path, block: int) -> Path:
    """The model with a block that adds next to nothing."""
    content = bytearray(source.read_bytes())
    with open_gguf(source) as model:
        for name in ("attn_output", "ffn_down"):
            tensor = model.tensor(f"blk.{block}.{name}.weight")
            assert tensor is not None
            rows = (model.rows(tensor) * 1e-3).astype("<f2").tobytes()
            content[tensor.offset : tensor.offset + tensor.size_bytes] = rows
    path.write_bytes(content)
    return path


def test_the_base_follows(model: Path, tmp_path: Path) -> None:
    """Cut by cut, the other model is cut at the same places."""
    neurons = tuple(range(0, 512, 2))
    cuts = [Structure(layers=(0, 3)), Structure(neurons={0: neurons, 1: neurons})]
    for index, structure in enumerate(cuts):
        (tmp_path / f"s{index}.json").write_bytes(structure.encode())
    files = {"model": model, "structure-0": tmp_path / "s0.json", "structure-1": tmp_path / "s1.json"}
    assert follow(context(tmp_path / "out", files))["cuts"] == 2
    before, after = tensors(model), tensors(tmp_path / "out" / "model.gguf")
    assert np.array_equal(after["blk.1.ffn_down.weight"], before["blk.3.ffn_down.weight"][:, ::2])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.gguf"]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("expected a multiple of 256 below the base's 512", {"keep_ffn_width": 300}),
        ("expected a multiple of 256 below the base's 512", {"keep_ffn_width": 512}),
        ("the base has 4 blocks", {"drop_layers": 4}),
        ("of which 259 bytes and special tokens must stay", {"keep_vocabulary_tokens": 100}),
    ],
)
def test_numbers_that_do_not_fit_are_refused_first(
    model: Path, tmp_path: Path, message: str, asked: dict[str, int]
) -> None:
    with pytest.raises(UsageError, match=message):
        check(context(tmp_path / "out", {"base": model}, asked=[asked], training=False, torch=None))


def test_training_without_torch_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    """And pruning alone is not."""
    asked = [{"drop_layers": 1}]
    with pytest.raises(BuildError, match="torch is not installed") as caught:
        check(context(tmp_path / "a", {"base": model}, asked=asked, training=True, torch=None))
    assert "slmops[train]" in caught.value.hint
    assert (
        check(context(tmp_path / "b", {"base": model}, asked=asked, training=False, torch=None))["layers"]
        == 3
    )


def other_architecture(path: Path) -> Path:
    writer = GGUFWriter(path, "gemma3")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(512)
    writer.add_head_count(1)
    writer.add_context_length(64)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 64), np.float16))
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((64, 512), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("SentencePiece", {"keep_vocabulary_tokens": 1}),
        ("blocks of architecture 'gemma3' are not known to be alike", {"drop_layers": 1}),
        (r"blk\.0\.ffn_gate\.weight is missing", {"keep_ffn_width": 256}),
    ],
)
def test_models_that_cannot_be_cut_are_refused_by_name(
    tmp_path: Path, message: str, asked: dict[str, int]
) -> None:
    base = other_architecture(tmp_path / "base.gguf")
    with pytest.raises(BaseModelError, match=message):
        check(context(tmp_path / "out", {"base": base}, asked=[asked], training=False, torch=None))


def test_models_that_cannot_be_trained_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    """Another architecture, or tensors that the trainer would leave out (scaled rotary positions, biases)."""
    asked: dict[str, Any] = {"asked": [], "training": True, "torch": "2"}
    assert check(context(tmp_path / "a", {"base": model}, **asked))
    other = other_architecture(tmp_path / "other.gguf")
    with pytest.raises(BuildError, match="architecture 'gemma3' cannot be trained"):
        check(context(tmp_path / "b", {"base": other}, **asked))
    content = model.read_bytes().replace(b"blk.2.ffn_norm.weight", b"blk.2.attn_q.fishes--")
    (tmp_path / "odd.gguf").write_bytes(content)
    with pytest.raises(BuildError, match=r"the trainer does not know blk\.2\.attn_q\.fishes--"):
        check(context(tmp_path / "c", {"base": tmp_path / "odd.gguf"}, **asked))


def test_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    source = make_tiny_gguf(tmp_path / "m.gguf", ffn=512)
    with (
        open_gguf(source) as opened,
        pytest.raises(BuildError, match=r"blk\.0\.ffn_down\.weight: weights beyond"),
    ):
        huge = {"blk.0.ffn_down.weight": np.full((64, 512), 1e6, np.float32)}
        cut(tmp_path / "o.gguf", opened, Structure(), changed=huge)
