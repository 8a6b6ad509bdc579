"""The real small model by way of a Hugging Face directory: the same weights to the bit, token ids and logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.hf_directory import write_hf

from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.hf.directory import needed_files
from slmops.build.steps.convert import from_hf
from slmops.build.steps.weights import reference
from slmops.runtimes.llama_cpp.logits import LogitModel

pytestmark = [pytest.mark.model, pytest.mark.slow]

TEXTS = (
    "The quick brown fox, 12345 times; naïve café 日本語 🙂\n\n\t  end",
    "<|im_start|>user\nWhat's 7*8?<|im_end|>\n<|im_start|>assistant\n",
)


def test_there_and_back(small_model: Path, tmp_path: Path) -> None:
    """Quantised GGUF -> three float32 shards -> GGUF equals the dequantised original in every tensor's bytes."""
    folder = write_hf(small_model, tmp_path / "hf", shards=3)
    for name in ("converted", "dequantised"):
        (tmp_path / name).mkdir()
    params = {"name": "x", "licence": None, "plain_template": ""}
    files = needed_files(folder)
    value = from_hf(StepContext(files, {}, params, tmp_path / "converted", lambda ratio, note: None))
    reference(StepContext({"model": small_model}, {}, {}, tmp_path / "dequantised", lambda ratio, note: None))
    one, other = tmp_path / "converted" / "base.gguf", tmp_path / "dequantised" / "model.gguf"
    with open_gguf(one) as ours, open_gguf(other) as theirs:
        assert len(ours.layout.tensors) == len(theirs.layout.tensors) == 272
        for tensor in theirs.layout.tensors:
            twin = ours.tensor(tensor.name)
            assert twin is not None
            assert bytes(ours.blob(twin)) == bytes(theirs.blob(tensor)), tensor.name
        key = "tokenizer.chat_template"
        assert ours.layout.metadata[key] == theirs.layout.metadata[key]
    assert value["licence"] == "apache-2.0"
    with LogitModel(one, context_tokens=64) as a, LogitModel(small_model, context_tokens=64) as b:
        assert all(a.tokenize(text) == b.tokenize(text) for text in TEXTS)
    with LogitModel(one, context_tokens=64) as a, LogitModel(other, context_tokens=64) as b:
        token_ids = b.tokenize(TEXTS[1])
        assert np.array_equal(a.logits(token_ids), b.logits(token_ids))
