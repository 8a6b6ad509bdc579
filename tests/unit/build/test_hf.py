"""A Hugging Face directory becomes the same model in GGUF: weights, tokens, template, licence; or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.hf_directory import halves, sentencepiece, write_hf
from tests.support.tiny_gemma import make_tiny_gemma
from tests.support.tiny_model import CHATML, make_tiny_gguf

from slmops.artifact.gguf_layout import parse_gguf
from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.hf.architectures import interleave_rotary_rows, rope_factors
from slmops.build.hf.directory import needed_files
from slmops.build.hf.sentencepiece import read_pieces
from slmops.build.steps.convert import check, floats_of, from_hf
from slmops.build.steps.fetch import with_template
from slmops.core.errors import BaseModelError
from slmops.runtimes.llama_cpp.logits import LogitModel

TEXTS = (
    "turn on the lamp",
    "  two  spaces\n\nand lines 1234",
    "naïve 日本語 🙂",
    "<|im_start|>user\nhello<|im_end|>\n",
)


def convert(folder: Path, out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    settings = {"name": "tiny", "licence": None, "plain_template": "PLAIN"} | params
    return from_hf(StepContext(needed_files(folder), {}, settings, out, lambda ratio, note: None))


def same_model(one: Path, other: Path) -> None:
    """Equal tensors (after F16), token ids and logits."""
    with open_gguf(one) as a, open_gguf(other) as b:
        assert {t.name for t in a.layout.tensors} == {t.name for t in b.layout.tensors}
        for tensor in a.layout.tensors:
            twin = b.tensor(tensor.name)
            assert twin is not None
            assert np.array_equal(a.rows(tensor), b.rows(twin)), tensor.name
    with LogitModel(one, context_tokens=64) as a_model, LogitModel(other, context_tokens=64) as b_model:
        for text in TEXTS:
            token_ids = a_model.tokenize(text)
            assert token_ids == b_model.tokenize(text)
            assert np.array_equal(a_model.logits(token_ids), b_model.logits(token_ids))


@pytest.mark.parametrize(("dtype", "shards"), [("F32", 1), ("F16", 3)])
def test_a_llama_comes_back_the_same(tmp_path: Path, dtype: str, shards: int) -> None:
    """GGUF -> safetensors (one file or three) -> GGUF: q and k are permuted back, template and licence are carried."""
    source = make_tiny_gguf(tmp_path / "a.gguf", heads=2, kv_heads=1)
    folder = write_hf(source, tmp_path / "hf", dtype=dtype, shards=shards)
    value = convert(folder, tmp_path / "out")
    same_model(source, tmp_path / "out" / "base.gguf")
    assert (value["architecture"], value["licence"], value["chat_template"]) == (
        "llama",
        "apache-2.0",
        "the model's",
    )
    layout = parse_gguf((tmp_path / "out" / "base.gguf").read_bytes())
    assert layout.metadata["tokenizer.chat_template"] == CHATML
    assert layout.metadata["tokenizer.ggml.pre"] == "smollm"


def test_a_gemma_comes_back_the_same(tmp_path: Path) -> None:
    """Another family: norms stored minus one, SentencePiece, no chat template, so it gets the plain one."""
    source = make_tiny_gemma(tmp_path / "a.gguf")
    value = convert(write_hf(source, tmp_path / "hf"), tmp_path / "out")
    same_model(source, tmp_path / "out" / "base.gguf")
    assert (value["architecture"], value["licence"], value["chat_template"]) == ("gemma3", "gemma", "plain")
    layout = parse_gguf((tmp_path / "out" / "base.gguf").read_bytes())
    assert layout.metadata["tokenizer.chat_template"] == "PLAIN"


def test_equal_directories_give_equal_bytes(tmp_path: Path) -> None:
    """However the weights are cut; the recipe's licence and template win over the model's."""
    source = make_tiny_gguf(tmp_path / "a.gguf")
    one = write_hf(source, tmp_path / "one", dtype="BF16")
    two = write_hf(source, tmp_path / "two", dtype="BF16", shards=2)
    convert(one, tmp_path / "x")
    convert(two, tmp_path / "y")
    assert (tmp_path / "x" / "base.gguf").read_bytes() == (tmp_path / "y" / "base.gguf").read_bytes()
    (tmp_path / "own.jinja").write_text("OWN")
    files = {**needed_files(one), "chat-template": tmp_path / "own.jinja"}
    (tmp_path / "z").mkdir()
    params = {"name": "tiny", "licence": "mit", "plain_template": "PLAIN"}
    value = from_hf(StepContext(files, {}, params, tmp_path / "z", lambda ratio, note: None))
    assert (value["licence"], value["chat_template"]) == ("mit", "the recipe's")


def test_bfloat16_is_read_exactly() -> None:
    """Upper half of a float32, all bits of it."""
    values = np.array([0.0, -0.0, 1.0, -2.5, 3.0e38, 1e-38], np.float32).view(np.uint32) & 0xFFFF0000
    blob = (values >> 16).astype("<u2").tobytes()
    assert np.array_equal(floats_of("BF16", blob).view(np.uint32), values)


def test_rotary_rows_are_interleaved() -> None:
    """Row i and row i + half of a head become neighbours, and the inverse undoes it."""
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert interleave_rotary_rows(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert np.array_equal(halves(interleave_rotary_rows(rows, 2), 2), rows)


def test_long_context_rotary_factors() -> None:
    """Llama 3's rule: high frequencies as they are, low ones divided, smooth between; nothing without the setting."""
    config = {"hidden_size": 128, "num_attention_heads": 2, "rope_theta": 500000.0}
    assert rope_factors(config) is None
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = rope_factors(config | {"rope_scaling": scaling})
    assert factors is not None
    assert (factors[0], factors[-1]) == (1.0, 8.0)
    assert np.all(np.diff(factors) >= 0)
    assert np.any((factors > 1) & (factors < 8))


# --- refusals -------------------------------------------------------------------------------------------------------


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        document |= changes
        (folder / name).write_text(json.dumps(document))

    return apply


def edit_tokenizer(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        document["model"] |= changes.pop("model", {})
        (folder / "tokenizer.json").write_text(json.dumps(document | changes))

    return apply


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return apply


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


def wrong_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00003-of-00003.safetensors"
    path.write_text(json.dumps(index))


def escaping_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))


SHARD = "model-00002-of-00002.safetensors"
REFUSALS: list[tuple[int, Callable[[Path], Any], str]] = [
    (
        1,
        edit("config.json", architectures=["MambaForCausalLM"]),
        "architecture 'MambaForCausalLM' is not supported",
    ),
    (1, edit("config.json", architectures=None), "architecture None is not supported"),
    (1, edit("config.json", hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    (1, edit("config.json", rope_scaling={"rope_type": "yarn"}), "rope_type 'yarn' is not supported"),
    (1, edit("config.json", num_hidden_layers=3), r"no blk\.2\.attn_k\.weight"),
    (1, edit("config.json", num_hidden_layers=1), r"model\.layers\.1\.\S+' is none of llama's"),
    (1, edit("config.json", hidden_size="64"), "hidden_size is '64', expected a positive integer"),
    (1, edit("config.json", tie_word_embeddings=False), r"no lm_head\.weight"),
    (1, edit("config.json", quantization_config={"quant_method": "gptq"}), "already quantised .*'gptq'"),
    (1, lambda f: (f / "config.json").write_text("{"), r"config\.json:1:2: not valid JSON"),
    (1, lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    (1, rename("model.safetensors", "pytorch_model.bin"), "a Python pickle: .* refused"),
    (1, rename("model.safetensors", "weights.dat"), r"has no model\.safetensors"),
    (1, cut("model.safetensors", 0.5), "truncated safetensors"),
    (1, lambda f: (f / "model.safetensors").write_bytes(b""), "is empty"),
    (1, lambda f: (f / "tokenizer.json").unlink(), r"neither tokenizer\.json nor tokenizer\.model"),
    (1, edit_tokenizer(model={"type": "Unigram"}), "tokenizer of type 'Unigram' is not supported"),
    (1, edit_tokenizer(model={"byte_fallback": True}), "BPE with byte fallback is not supported"),
    (1, edit_tokenizer(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer .*Whitespace.* is none of"),
    (1, edit_tokenizer(normalizer={"type": "Lowercase"}), "normalizer 'Lowercase' is not supported"),
    (1, edit_tokenizer(model={"ignore_merges": True}), "ignore_merges is True"),
    (
        1,
        edit_tokenizer(added_tokens=[{"id": 9999, "content": "<x>"}]),
        "'<x>' has id 9999, the embedding has",
    ),
    (2, lambda f: (f / SHARD).unlink(), rf"names {SHARD}, which is not in"),
    (2, cut(SHARD, 0.9), rf"{SHARD}: truncated safetensors"),
    (2, wrong_index, r"model-00003-of-00003\.safetensors, which is not in"),
    (2, escaping_index, "expected a name like model-00001"),
    (2, lambda f: (f / "model.safetensors.index.json").unlink(), r"but no model\.safetensors\.index\.json"),
]


@pytest.mark.parametrize(("shards", "spoil", "message"), REFUSALS)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, shards: int, spoil: Callable[[Path], Any], message: str
) -> None:
    """Before any work: from headers and small files, with the fix."""
    folder = write_hf(make_tiny_gguf(tmp_path / "a.gguf"), tmp_path / "hf", shards=shards)
    spoil(folder)
    with pytest.raises(BaseModelError, match=message) as caught:
        check(needed_files(folder))
    assert caught.value.hint


def test_other_dtypes_and_tokenizers_are_refused(tmp_path: Path) -> None:
    """A float that is none of ours; SentencePiece that is not BPE; a damaged tokenizer.model."""
    folder = write_hf(make_tiny_gguf(tmp_path / "a.gguf"), tmp_path / "hf")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"dtype": "F32"', b'"dtype": "I32"'))
    with pytest.raises(BaseModelError, match="has dtype I32, expected one of F32, F16, BF16"):
        check(needed_files(folder))
    unigram = sentencepiece(["a", "b"], [0.0, -1.0], [1, 1], model_type=1)
    with pytest.raises(BaseModelError, match="model type 'unigram', expected 'bpe'"):
        read_pieces(unigram, "tokenizer.model")
    for content in (b"\x0a\xff\xff", b"\xff" * 12, b""):
        with pytest.raises(BaseModelError, match=r"tokenizer\.model: "):
            read_pieces(content, "tokenizer.model")
    with pytest.raises(BaseModelError, match="is no directory"):
        needed_files(tmp_path / "missing")


def test_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    """By tensor and value, and nothing is left that looks whole."""
    folder = write_hf(make_tiny_gguf(tmp_path / "a.gguf"), tmp_path / "hf", dtype="BF16")
    spoilt = np.frombuffer(np.float32(1e38).tobytes(), "<u2")[1]
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-130:-128] = int(spoilt).to_bytes(2, "little")
    (folder / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(BaseModelError, match=r"has a weight of .*, F16 holds finite ones up to 65504"):
        convert(folder, tmp_path / "out")


def test_a_gguf_without_a_template_gets_one(tmp_path: Path) -> None:
    """The plain one, or the recipe's; weights and vocabulary stay as they are."""
    source = make_tiny_gemma(tmp_path / "a.gguf")
    (tmp_path / "own.jinja").write_text("OWN")
    for name, files, expected in (
        ("plain", {}, ("PLAIN", "plain")),
        ("own", {"chat-template": tmp_path / "own.jinja"}, ("OWN", "the recipe's")),
    ):
        out = tmp_path / name
        out.mkdir()
        context = StepContext(
            {"base": source, **files}, {}, {"plain_template": "PLAIN"}, out, lambda ratio, note: None
        )
        value = with_template(context)
        layout = parse_gguf((out / "base.gguf").read_bytes())
        assert (layout.metadata["tokenizer.chat_template"], value["chat_template"]) == expected
        same_model(source, out / "base.gguf")
        assert [path.name for path in out.iterdir()] == ["base.gguf"]
