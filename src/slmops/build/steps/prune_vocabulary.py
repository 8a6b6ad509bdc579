"""Vocabulary trimming as a step: count what the task's text needs, cut embedding and tokenizer, prove the round trip.

See :mod:`slmops.build.vocabulary` for what stays and why. What a trimmed vocabulary costs cannot be seen in a divergence over the
kept tokens, so it is measured here: how much longer text becomes in tokens, and how much probability the whole model gives to
tokens that are gone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmops.build.conversations import Item, read_calibration, read_items
from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.divergence import log_softmax
from slmops.build.structure import Structure, cut
from slmops.build.vocabulary import Vocabulary, kept_tokens, read_vocabulary
from slmops.core.errors import BuildError
from slmops.runtimes import EngineSpec, open_engine
from slmops.runtimes.llama_cpp.logits import LogitModel

USES = (
    "slmops.artifact.gguf_layout",
    "slmops.build.conversations",
    "slmops.build.gguf_file",
    "slmops.build.steps.divergence",
    "slmops.build.structure",
    "slmops.build.vocabulary",
    "slmops.runtimes.llama_cpp.logits",
    "slmops.runtimes.llama_cpp.quantise",
)
#: conversations that go through the chat template, for the words of the template itself
TEMPLATED_ITEMS = 16
#: characters of each text, and tokens on which the lost probability is measured
LONGEST_CHARACTERS = 4000
MASS_TOKENS = 512


def vocabulary(context: StepContext) -> dict[str, Any]:
    """Trim the vocabulary.

    Files in: ``model``, ``calibration``, maybe ``train``, ``system_prompt`` and ``general-0``... (plain text); out:
    ``model.gguf``, ``structure.json``. Params: ``keep_vocabulary_tokens``. Value: ``tokens_before``, ``tokens``,
    ``used_tokens`` (that the text needs), ``used_kept_tokens``, ``longer_ratio`` (tokens of the text after to before) and
    ``lost_mass`` (mean probability of tokens that are gone, under the whole model).

    Raises:
        BaseModelError: a vocabulary that cannot be trimmed: names it.
        UsageError: too few or too many tokens are asked for.
        BuildError: a text does not survive (an invariant of ours).
    """
    texts = list(_texts(context.files))
    target = context.out / "model.gguf"
    with open_gguf(context.files["model"]) as model, _tokenizer(context.files["model"]) as whole:
        words = read_vocabulary(model)
        context.progress(0.05, f"counting tokens of {len(texts)} texts")
        written = [whole.tokenize(text) for text in texts]
        templated = asyncio.run(_templated(context.files))
        uses = Counter(token_id for token_ids in (*written, *templated) for token_id in token_ids)
        kept = kept_tokens(words, uses, int(context.params["keep_vocabulary_tokens"]))
        cut(
            target,
            model,
            Structure(tokens=tuple(kept)),
            progress=lambda ratio: context.progress(0.3 + 0.4 * ratio, "writing weights"),
        )
        lost = _lost_mass(whole, [*templated, *written], kept)
        context.progress(0.9, "round trip of every text")
        with _tokenizer(target) as trimmed:
            shorter = [trimmed.tokenize(text) for text in texts]
            for text, before, after in zip(texts, written, shorter, strict=True):
                if whole.detokenize(before) != trimmed.detokenize(after):
                    raise BuildError(
                        f"after trimming the vocabulary, the text {text[:40]!r} is not what it was",
                        hint="report it",
                    )
    (context.out / "structure.json").write_bytes(Structure(tokens=tuple(kept)).encode())
    return {
        "tokens_before": len(words.tokens),
        "tokens": len(kept),
        "used_tokens": len(uses),
        "used_kept_tokens": len(uses.keys() & set(kept)),
        "longer_ratio": sum(map(len, shorter)) / max(sum(map(len, written)), 1),
        "lost_mass": lost,
        "bytes": target.stat().st_size,
        "unreachable": _unreachable(words, kept),
    }


def _unreachable(words: Vocabulary, kept: Sequence[int]) -> int:
    """Kept tokens that no kept merge makes, beside those that are kept whatever it costs."""
    texts = {words.tokens[token_id] for token_id in kept}
    made = {left + right for left, right in words.merges if left in texts and right in texts}
    return sum(words.tokens[i] not in made for i in set(kept) - words.always_kept())


def _texts(files: Mapping[str, Path]) -> Iterator[str]:
    """What the task's users and the model say, and the general text, each once."""
    seen: set[str] = set()
    for item in _items(files):
        for text in (*(message["content"] for message in item.messages), item.answer):
            if text and text not in seen:
                seen.add(text)
                yield text[:LONGEST_CHARACTERS]
    for name in sorted(files):
        if name.startswith("general-"):
            whole = files[name].read_text(encoding="utf-8", errors="replace")
            yield from (
                whole[at : at + LONGEST_CHARACTERS] for at in range(0, len(whole), LONGEST_CHARACTERS)
            )


def _items(files: Mapping[str, Path]) -> list[Item]:
    prompt = files["system_prompt"].read_text(encoding="utf-8").strip() if "system_prompt" in files else ""
    items = read_calibration(files["calibration"], prompt)
    return items + (read_items(files["train"]) if "train" in files else [])


async def _templated(files: Mapping[str, Path]) -> list[list[int]]:
    """Some conversations as the chat template writes them: its own words count, too."""
    spec = EngineSpec(
        runtime="llama.cpp", model_path=files["model"], context_tokens=512, slots=1, repack=False
    )
    async with open_engine(spec) as engine:
        return [
            [
                *await engine.apply_template(item.messages),
                *await engine.tokenize(item.answer, add_special=False, parse_special=False),
            ]
            for item in _items(files)[:TEMPLATED_ITEMS]
        ]


def _lost_mass(whole: LogitModel, sequences: Sequence[Sequence[int]], kept: Sequence[int]) -> float:
    """Mean probability, under the whole model, of tokens that are gone."""
    gone = np.ones(whole.vocab_tokens, dtype=bool)
    gone[list(kept)] = False
    masses, left = [], MASS_TOKENS
    for sequence in sequences:
        part = list(sequence)[: min(left, whole.context_tokens)]
        if len(part) > 1:
            masses.append(np.exp(log_softmax(whole.logits(part))[:, gone].astype(np.float64)).sum(axis=1))
            left -= len(part)
        if left <= 1:
            break
    return float(np.concatenate(masses).mean()) if masses else 0.0


def _tokenizer(path: Path) -> LogitModel:
    return LogitModel(path, context_tokens=MASS_TOKENS, threads=1)
