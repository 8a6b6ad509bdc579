"""Token ids of a converted tokenizer, against Hugging Face's own library: for every splitting that is on the list.

Needs ``tokenizers`` (extra ``train``); the vocabulary has merges across digits, blanks, quotes and line ends, so that splitting
at another place gives other ids.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.support.hf_directory import write_hf, write_weights
from tests.support.tiny_model import make_tiny_gguf

from slmops.artifact.safetensors_layout import parse_safetensors
from slmops.build.graph import StepContext
from slmops.build.hf.directory import needed_files
from slmops.build.hf.tokenizer import _GPT2, _LLAMA3, _QWEN2
from slmops.build.steps.convert import floats_of, from_hf
from slmops.runtimes.llama_cpp.logits import LogitModel

tokenizers = pytest.importorskip("tokenizers", reason='needs tokenizers: pip install "slmops[train]"')

MERGES = [
    "1 2",
    "12 3",
    "123 4",
    "3 4",
    "Ġ t",
    "Ġ the",
    "Ġ 1",
    "Ġ Ġ",
    "ĠĠ Ġ",
    "Ċ Ċ",
    "' s",
    "' S",
    "e r",
    "! !",
    "! Ċ",
    "Ġ !",
]
TEXTS = (
    "the 1234 12341234 12.34",
    "it's IT'S she'Ll  the   end\n\n\n  !!\n!!",
    "a\tb \n c 日本語123 naïve 🙂 x1y2",
    " 1 12 123   ",
    "<|im_start|>user 1234<|im_end|>\n",
)
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


SPLITTINGS = {
    "smollm": [DIGITS, LEVEL | {"use_regex": True}],
    "gpt-2": [LEVEL | {"use_regex": True}],
    "gpt-2 written out": [split(_GPT2), LEVEL | {"use_regex": False}],
    "llama-bpe": [split(_LLAMA3), LEVEL | {"use_regex": False}],
    "qwen2": [split(_QWEN2), LEVEL | {"use_regex": False}],
}


def directory(folder: Path, name: str) -> Path:
    """The tiny model with more tokens and another splitting."""
    hf = write_hf(make_tiny_gguf(folder / "a.gguf"), folder / "hf")
    document = json.loads((hf / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    for merge in MERGES:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    document["model"]["merges"] += [
        pair for m in MERGES if (pair := m.split()) not in document["model"]["merges"]
    ]
    document["model"]["ignore_merges"] = name == "llama-bpe"
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": SPLITTINGS[name]}
    (hf / "tokenizer.json").write_text(json.dumps(document))
    content = (hf / "model.safetensors").read_bytes()
    tensors = {
        t.name: floats_of(t.dtype, content[t.offset : t.offset + t.size_bytes]).reshape(t.shape)
        for t in parse_safetensors(content, "x")
    }
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.vstack([rows, rows[: len(vocab) - len(rows)]])
    write_weights(hf, tensors)
    return hf


@pytest.mark.parametrize("name", sorted(SPLITTINGS))
def test_the_engine_splits_as_the_tokenizer_does(tmp_path: Path, name: str) -> None:
    hf = directory(tmp_path, name)
    params = {"name": "x", "licence": None, "plain_template": ""}
    (tmp_path / "out").mkdir()
    from_hf(StepContext(needed_files(hf), {}, params, tmp_path / "out", lambda ratio, note: None))
    theirs = tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json"))
    with LogitModel(tmp_path / "out" / "base.gguf", context_tokens=64) as model:
        for text in TEXTS:
            assert (
                model.tokenize(text, parse_special=True) == theirs.encode(text, add_special_tokens=False).ids
            ), text
