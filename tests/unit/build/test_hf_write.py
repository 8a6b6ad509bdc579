"""A reference as a Hugging Face directory: read back by the converter it is the same model with the same tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from tests.support.tiny_gemma import make_tiny_gemma
from tests.support.tiny_model import CHATML, IM_END, IM_START, make_tiny_gguf

from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.hf.directory import needed_files
from slmops.build.hf.write import facts_of, halved_rotary_rows, tokenizer_document, write_directory
from slmops.build.parity.texts import strings
from slmops.build.steps.convert import from_hf
from slmops.core.errors import BaseModelError
from slmops.runtimes.llama_cpp.logits import LogitModel


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_gguf(tmp_path / "tiny.gguf", seed=3, heads=2, kv_heads=1)


def written(gguf: Path, folder: Path) -> Path:
    folder.mkdir()
    with open_gguf(gguf) as model:
        write_directory(model, folder)
    return folder


def test_there_and_back_gives_the_same_tensors(tiny: Path, tmp_path: Path) -> None:
    """Every tensor bit for bit, rotary rows included, by the converter that reads Hugging Face directories."""
    folder = written(tiny, tmp_path / "hf")
    out = tmp_path / "out"
    out.mkdir()
    params = {"name": "tiny", "licence": None, "plain_template": "x"}
    from_hf(StepContext(needed_files(folder), {}, params, out, lambda ratio, note: None))
    ours = {t.name: np.array(t.data) for t in GGUFReader(tiny).tensors}
    back = {t.name: np.array(t.data) for t in GGUFReader(out / "base.gguf").tensors}
    assert set(ours) == set(back)
    for name, data in ours.items():
        assert np.array_equal(data.ravel(), back[name].ravel()), name
    field = GGUFReader(out / "base.gguf").get_field
    assert field("tokenizer.chat_template").contents() == CHATML
    assert field("tokenizer.ggml.pre").contents() == "smollm"
    assert field("llama.attention.layer_norm_rms_epsilon").contents() == pytest.approx(1e-5, rel=1e-6)
    assert (
        field("tokenizer.ggml.merges").contents()
        == GGUFReader(tiny).get_field("tokenizer.ggml.merges").contents()
    )


def test_what_the_export_says_of_itself(tiny: Path) -> None:
    with open_gguf(tiny) as model:
        document = facts_of(model).document("int4", 512)
    assert document["eos_tokens"] == [IM_END, 256]  # <|endoftext|> ends an answer, too, as in llama.cpp
    assert (document["bos_token"], document["add_bos"]) == (IM_START, False)
    assert (document["context_tokens"], document["precision"]) == (512, "int4")
    assert document["shape"]["head_dim"] == 32
    with LogitModel(tiny) as engine:
        assert all(engine.is_end(token) for token in document["eos_tokens"])
        assert document["shape"]["parameters"] == engine.parameters


def test_config_and_template_bytes(tiny: Path, tmp_path: Path) -> None:
    folder = written(tiny, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 10000.0 and config["tie_word_embeddings"] is True
    assert (folder / "chat_template.jinja").read_bytes() == CHATML.encode()
    again = written(tiny, tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_rotary_rows_go_back_to_halves() -> None:
    rows = np.arange(8).reshape(8, 1)
    assert halved_rotary_rows(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = make_tiny_gemma(tmp_path / "gemma.gguf")
    with open_gguf(path) as model, pytest.raises(BaseModelError, match="'gemma3' cannot be exported"):
        write_directory(model, tmp_path)


def test_an_unknown_splitting_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes().replace(b"smollm", b"smalll")
    other = tmp_path / "other.gguf"
    other.write_bytes(content)
    with open_gguf(other) as model, pytest.raises(BaseModelError, match="pre-tokenizer 'smalll'"):
        tokenizer_document(model)


def test_a_quantised_file_is_no_source(tmp_path: Path, tiny: Path) -> None:
    content = bytearray(tiny.read_bytes())
    with open_gguf(tiny) as model:
        tensor = model.tensor("blk.0.attn_q.weight")
        assert tensor is not None and tensor.type_name == "F16"
    with open_gguf(tiny) as model:
        from slmops.build.gguf_file import NewTensor, write_gguf
        from slmops.runtimes.llama_cpp.quantise import quantise_rows

        made = [
            NewTensor(
                t.name,
                "Q8_0" if t.name == "blk.0.attn_q.weight" else t.type_name,
                t.shape,
                (lambda t=t: quantise_rows("Q8_0", model.rows(t)))
                if t.name == "blk.0.attn_q.weight"
                else (lambda t=t: bytes(model.blob(t))),
            )
            for t in model.layout.tensors
        ]
        write_gguf(tmp_path / "q.gguf", model, made, replace={})
    assert content
    (tmp_path / "hf").mkdir()
    with open_gguf(tmp_path / "q.gguf") as model, pytest.raises(BaseModelError, match="Q8_0"):
        write_directory(model, tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf")


def test_a_thousand_strings_by_hugging_faces_own_library(tiny: Path, tmp_path: Path) -> None:
    """The tokenizer.json that is written from GGUF metadata, read by the library that defines the format."""
    tokenizers = pytest.importorskip("tokenizers", reason='needs tokenizers: pip install "slmops[train]"')
    theirs = tokenizers.Tokenizer.from_file(str(written(tiny, tmp_path / "hf") / "tokenizer.json"))
    texts = strings(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    with LogitModel(tiny) as engine:
        for text in texts:
            ours = engine.tokenize(text, parse_special=True)
            assert theirs.encode(text, add_special_tokens=False).ids == ours, repr(text)
