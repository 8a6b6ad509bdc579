"""Error feedback in stages: each stage's statistics are those of the quantised layers before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.build.gguf_file import open_gguf
from slmops.build.memo import Memo
from slmops.build.steps.calibrate import Hessians, imatrix, read_imatrix, unpacked
from slmops.build.steps.sensitivity import is_quantisable, patch
from slmops.build.steps.sequential import recollect, stages_of
from slmops.build.steps.tensors import RUN, TensorQuantiser
from slmops.runtimes.llama_cpp.imatrix import collect_hessians
from slmops.runtimes.llama_cpp.quantise import dequantise_rows

SEQUENCES = [[int(t) for t in np.random.default_rng(1).integers(3, 250, 64)] for _ in range(8)]


def context(folder: Path, files: dict[str, Path], **more: Any) -> Any:
    folder.mkdir()
    return SimpleNamespace(
        files=files,
        values=more.get("values", {}),
        params=more.get("params", {}),
        out=folder,
        memo=more.get("memo"),
        progress=lambda ratio, note: None,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sequential")
    model, text = make_tiny_gguf(folder / "tiny.gguf", seed=3, scale=0.8), folder / "text.json"
    text.write_text(json.dumps(SEQUENCES))
    first = context(folder / "imatrix", {"model": model, "text": text})
    facts = imatrix(first)
    with open_gguf(model) as opened:
        types = {t.name: "Q4_0" for t in opened.layout.tensors if is_quantisable(t)}
    files = {
        "model": model,
        "text": text,
        "imatrix": first.out / "imatrix.npz",
        "hessians": first.out / "hessians.npz",
    }
    return SimpleNamespace(folder=folder, files=files, values={"choice": {"types": types}, "inputs": facts})


def test_a_stage_sees_what_the_quantised_layers_before_it_give(world: Any) -> None:
    """The last stage's Hessians are those of a file whose embedding and earlier layers are quantised; the same every time."""
    run = context(world.folder / "run", world.files, values=world.values, params={"stages": 2})
    told = recollect(run)
    again = context(
        world.folder / "again",
        world.files,
        values=world.values,
        params={"stages": 2},
        memo=world.folder / "memo",
    )
    assert told == recollect(again)
    assert (run.out / "hessians.npz").read_bytes() == (again.out / "hessians.npz").read_bytes()
    assert set(told["inputs"]) == set(world.values["inputs"]["inputs"])
    now = Hessians(run.out / "hessians.npz", told["inputs"])
    exact = Hessians(world.files["hessians"], world.values["inputs"]["inputs"])
    before = world.folder / "before.gguf"
    shutil.copyfile(world.files["model"], before)
    tokens = world.values["inputs"]["tokens"]
    with open_gguf(world.files["model"]) as model, before.open("r+b", buffering=0) as sink:
        quantiser = TensorQuantiser(
            model, {}, now, Memo(None, "slmops.build.steps.tensors:TensorQuantiser"), tokens
        )
        layers = model.layout.shape().layers
        last = {
            t.name for t in stages_of([t for t in model.layout.tensors if is_quantisable(t)], layers, 2)[2]
        }
        for tensor in model.layout.tensors:
            if tensor.name in now_types(world) and tensor.name not in last:
                rows = dequantise_rows("Q4_0", quantiser.make(tensor, "Q4_0"), tensor.shape[0])
                patch(sink, tensor, rows.astype("<f2").tobytes())
    token_ids = [token for sequence in SEQUENCES for token in sequence]
    collected = list(collect_hessians(before, token_ids, only=last))
    assert {name for hessian in collected for name in hessian.tensors} == last
    for hessian in collected:
        triangle, was = now.triangle(hessian.tensors[0]), exact.triangle(hessian.tensors[0])
        assert triangle is not None and was is not None
        np.testing.assert_allclose(unpacked(triangle), hessian.matrix, rtol=1e-4, atol=1e-6)
        assert np.abs(unpacked(was) - hessian.matrix).max() > 1e-3 * np.abs(hessian.matrix).max()
    assert not list(run.out.glob(".scratch*"))


def now_types(world: Any) -> dict[str, str]:
    types: dict[str, str] = world.values["choice"]["types"]
    return types


def test_stages_follow_the_order_of_the_model() -> None:
    """The embedding first, layers in groups, the output matrix last; more stages than layers are one a layer."""
    names = [
        "output.weight",
        "blk.2.ffn_up.weight",
        "token_embd.weight",
        "blk.0.attn_q.weight",
        "blk.1.attn_q.weight",
    ]
    tensors: Any = [SimpleNamespace(name=name) for name in names]
    found = [[tensor.name for tensor in stage] for stage in stages_of(tensors, 3, 8)]
    assert found == [
        ["token_embd.weight"],
        ["blk.0.attn_q.weight"],
        ["blk.1.attn_q.weight"],
        ["blk.2.ffn_up.weight"],
        ["output.weight"],
    ]
    assert [len(stage) for stage in stages_of(tensors, 3, 1)] == [1, 3, 1]


@pytest.mark.parametrize("type_name", ["Q5_0", "IQ4_NL", "Q8_0", "F16"])
def test_slices_of_a_tensor_are_the_tensor(
    world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, type_name: str
) -> None:
    """Made at once or in slices of few rows, fed back or rounded: the same bytes; and a slice that is known is not made again."""
    facts = world.values["inputs"]
    importance = read_imatrix(world.files["imatrix"])

    def made(memo: Memo) -> tuple[dict[str, bytes], dict[str, int]]:
        with open_gguf(world.files["model"]) as model:
            quantiser = TensorQuantiser(
                model, importance, Hessians(world.files["hessians"], facts["inputs"]), memo, facts["tokens"]
            )
            tensors = [t for t in model.layout.tensors if is_quantisable(t)]
            return {t.name: quantiser.make(t, type_name) for t in tensors}, dict(quantiser.ways)

    whole = made(Memo(None, RUN))
    monkeypatch.setattr("slmops.build.steps.tensors.SLICE_ROWS", 40)
    memo = Memo(tmp_path, RUN)
    assert made(memo) == whole
    slices, again = memo.made, Memo(tmp_path, RUN)
    assert made(again) == whole
    assert (again.made, again.found) == (0, slices)
    assert slices > len(whole[0]) or type_name == "F16"
