"""The parts of the common engine child, without a binding: sampling, stop strings, text, template."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.core.errors import RuntimeLoadError
from slmops.runtimes.token_loop.model import read_card
from slmops.runtimes.token_loop.sampler import Sampler, Sampling, best_of, log_softmax
from slmops.runtimes.token_loop.stops import StopFinder

FIXTURE = Path(__file__).parents[2] / "fixtures" / "runtimes" / "onnxruntime-genai"
OPEN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


# ---- sampling


def test_temperature_zero_takes_the_best_and_the_lower_id_of_two() -> None:
    assert Sampler(Sampling(temperature=0), []).choose(logits(1, 3, 3, 0)) == 1


def test_frequencies_follow_the_distribution() -> None:
    """With nothing cut off, tokens come as often as softmax of logits over temperature says."""
    for temperature in (0.5, 1.0, 2.0):
        sampler = Sampler(Sampling(temperature=temperature, seed=5, **OPEN), [])
        counts = Counter(sampler.choose(logits(0, 1, 2)) for _ in range(4000))
        wanted = np.exp(np.array([0, 1, 2]) / temperature)
        wanted /= wanted.sum()
        for token in range(3):
            assert counts[token] / 4000 == pytest.approx(wanted[token], abs=0.03)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),  # the best alone has 0.64
        ({"top_p": 0.7}, {0, 1}),  # the smallest set that reaches it
        ({"min_p": 0.3}, {0, 1}),  # relative to the best: 0.37 is in, 0.14 is not
    ],
)
def test_each_cut_keeps_what_it_should(how: dict[str, float], kept: set[int]) -> None:
    sampler = Sampler(Sampling(temperature=5.0, seed=1, **(OPEN | how)), [])  # type: ignore[arg-type]
    assert {sampler.choose(logits(4, 3, 2, 1)) for _ in range(300)} == kept


def test_a_grammar_forbids_whatever_the_logits_say() -> None:
    allowed = np.array([False, False, True])
    assert Sampler(Sampling(temperature=0), []).choose(logits(9, 8, -50), allowed) == 2


def test_penalties_and_bias_move_the_choice() -> None:
    said = Sampler(Sampling(temperature=0, presence_penalty=1.5), [])
    said.accept(0)
    assert said.choose(logits(2, 1)) == 1
    often = Sampler(Sampling(temperature=0, frequency_penalty=0.6), [])
    often.accept(0)
    assert often.choose(logits(2, 1)) == 0
    often.accept(0)
    assert often.choose(logits(2, 1)) == 1
    # OpenAI's penalties count the answer; llama.cpp's counts the prompt too
    assert Sampler(Sampling(temperature=0, presence_penalty=1.5), [0, 0]).choose(logits(2, 1)) == 0
    assert Sampler(Sampling(temperature=0, repeat_penalty=3.0), [0]).choose(logits(2, 1)) == 1
    assert Sampler(Sampling(temperature=0, bias={0: float("-inf")}), []).choose(logits(2, 1)) == 1


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed, **OPEN), [])
        return [sampler.choose(np.zeros(1000, dtype=np.float32)) for _ in range(8)]

    assert run(3) == run(3) != run(4)
    assert run(None) != run(None)


def test_the_best_of_are_sorted_and_normalised() -> None:
    rows = log_softmax(logits(1, 5, 3, 5))
    assert [token for token, _ in best_of(rows, 3)] == [1, 3, 2]
    assert np.exp(rows).sum() == pytest.approx(1.0)
    assert best_of(rows, 0) == []


# ---- stop strings


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), max_size=30),
)
def test_stops_do_not_hang_on_where_tokens_end(text: str, stops: list[str], cuts: list[int]) -> None:
    """Fed in any pieces, the answer ends before the first stop string, and nothing of it comes out early."""
    finder, said, at = StopFinder(stops), "", 0
    for cut in [*cuts, len(text)]:
        said += finder.feed(text[at : at + cut])
        at += cut
        if finder.found:
            break
    said += finder.end()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert finder.found == bool(ends)
    if not ends:
        assert said == text
    else:
        # an earlier beginning may be seen only after a later, shorter stop string is complete
        assert text.startswith(said)
        assert not any(stop in said for stop in stops)


# ---- text and template, which need the extra


def test_text_is_cut_into_whole_characters() -> None:
    pytest.importorskip("tokenizers", reason="the extra token-loop is not installed")
    from slmops.runtimes.token_loop.text import Text, Utf8Stream

    text = Text(FIXTURE / "tokenizer.json", bos_token=257, add_bos=True)
    raw = "Zwölf — 𝄞 <|im_end|>"
    ids = text.tokenize(raw)
    assert ids[-1] == 258
    assert text.detokenize(ids) == raw
    assert text.tokenize(raw, parse_special=False)[-1] == ord(">")
    assert text.tokenize("a", add_special=True) == [257, 97]
    assert text.tokenize("<|im_start|>a", add_special=True) == [257, 97]  # never a double BOS
    stream = Utf8Stream()
    parts = [stream.feed(text.bytes_of(token)) for token in ids if not text.is_control(token)]
    assert "".join(parts) == "Zwölf — 𝄞 "
    assert "\ufffd" not in "".join(parts)
    assert stream.feed(b"\xe2\x80") == ""
    assert stream.end() == "\ufffd"


def test_templates_run_in_a_sandbox() -> None:
    pytest.importorskip("jinja2", reason="the extra token-loop is not installed")
    from slmops.core.errors import UsageError
    from slmops.runtimes.token_loop.template import ChatTemplate

    source = (FIXTURE / "chat_template.jinja").read_text()
    chat = ChatTemplate(source, bos_text="<s>", eos_text="</s>")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat.render([{"role": "user", "content": parts}]) == (
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.render([{"role": "user", "content": "a"}], {"add_generation_prompt": False}).endswith(
        "<|im_end|>\n"
    )
    for hostile in ("{{ raise_exception('no system role') }}", "{{ ''.__class__.__mro__ }}{{ x.y.z }}"):
        with pytest.raises(UsageError):
            ChatTemplate(hostile, bos_text="", eos_text="").render([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate("{% if %}", bos_text="", eos_text="")


def test_a_card_that_says_nothing_is_named(tmp_path: Path) -> None:
    assert read_card(FIXTURE).eos_tokens == (258,)
    for content in ("", "[]", "{}", json.dumps({"schema": 2})):
        (tmp_path / "slmops-model.json").write_text(content)
        with pytest.raises(RuntimeLoadError, match=r"slmops-model\.json"):
            read_card(tmp_path)
