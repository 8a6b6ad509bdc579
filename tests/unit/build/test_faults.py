"""Every fault of the catalogue does what it says to a real file, which loads or is refused by the engine, never half-made."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.build.fault_catalogue import FAULTS, PROBES
from slmops.build.fault_edits import rows_of, zeroed
from slmops.build.faults import Fault, faulty_copy
from slmops.core.errors import BuildError, RuntimeLoadError, SlmopsError
from slmops.runtimes import EngineSpec
from slmops.runtimes.llama_cpp.native import NativeModel
from slmops.runtimes.llama_cpp.scorer import Scorer

IDS = list(range(40, 90))
#: the tiny model's norms are ones already
UNHURT = {"norm-ones"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", seed=3, layers=4)


def score(path: Path) -> tuple[float, ...] | None:
    """None: the engine refuses the file."""
    scorer = Scorer(path, context_tokens=256)
    try:
        return scorer.score(IDS).logprobs
    except RuntimeLoadError:
        return None
    finally:
        scorer.close()


def test_there_are_at_least_thirty_with_names_of_their_own() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 40
    assert 3 <= len(PROBES) <= 8
    assert all(fault.what for fault in FAULTS)
    assert all(fault.change or fault.settings or fault.lost_adapter for fault in FAULTS)


@pytest.mark.parametrize("fault", [d for d in FAULTS if d.change], ids=lambda fault: fault.name)
def test_a_fault_changes_what_the_model_says(tiny: Path, tmp_path: Path, fault: Fault) -> None:
    """Same size of data, other bytes; the same ones again; and scores, token ids or the engine's consent differ."""
    path, again = tmp_path / "faulty.gguf", tmp_path / "again.gguf"
    faulty_copy(tiny, path, fault)
    faulty_copy(tiny, again, fault)
    assert path.read_bytes() == again.read_bytes()
    assert (path.read_bytes() == tiny.read_bytes()) == (fault.name in UNHURT)
    if fault.name in UNHURT:
        return
    text = "the in er 1234, and 567 li on reTHE"
    try:
        model = NativeModel(path)
    except SlmopsError:
        return
    try:
        other = model.tokenize(text, add_special=True)
    finally:
        model.close()
    whole = NativeModel(tiny)
    try:
        differs = other != whole.tokenize(text, add_special=True)
    finally:
        whole.close()
    assert differs or score(path) != score(tiny) or fault.name in ("pre-tokenizer", "pre-default")


def test_only_what_is_faulty_differs(tiny: Path, tmp_path: Path) -> None:
    """Read by another reader: one tensor is zero, all others and all metadata are as they were."""
    path = tmp_path / "faulty.gguf"
    faulty_copy(tiny, path, Fault("x", "x", rows_of(0.5, "ffn_down", zeroed)))
    before, after = gguf.GGUFReader(tiny), gguf.GGUFReader(path)
    assert list(before.fields) == list(after.fields)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.tensor_type, tuple(old.shape)) == (new.name, new.tensor_type, tuple(new.shape))
        if old.name == "blk.2.ffn_down.weight":
            assert not np.asarray(new.data).any()
        else:
            np.testing.assert_array_equal(old.data, new.data)


def test_settings_are_laid_over_the_good_ones() -> None:
    spec = EngineSpec("llama.cpp", Path("m"), context_tokens=512, kv_cache="q8_0")
    by_name = {fault.name: fault for fault in FAULTS}
    assert by_name["kv-q4_0"].spec(spec).kv_cache == "q4_0"
    assert by_name["context-cut"].spec(spec).context_tokens == 32
    assert by_name["ffn-zeroed"].spec(spec) == spec


def test_a_model_without_the_part_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no tensor blk\.2\.nothing\.weight"):
        faulty_copy(tiny, tmp_path / "x.gguf", Fault("x", "x", rows_of(0.5, "nothing", zeroed)))
    assert not (tmp_path / "x.gguf").exists()
