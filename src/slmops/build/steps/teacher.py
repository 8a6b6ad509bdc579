"""What a student learns from: text, and a teacher's next-token distributions on it, from the engine. No torch here.

Distributions are kept compactly, and never as the likeliest tokens alone, which would teach that nothing else ever comes: for
each position the ``KEPT`` likeliest tokens with their log-probabilities, and everything else as one bucket with its mass
(the mass is what the kept ones lack to 1).

Source: Anshumann et al. 2025, arXiv:2503.16870 (why top-k alone is biased).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from typing import Any

import numpy as np

from slmops.build.conversations import read_calibration, read_items, shuffled
from slmops.build.graph import StepContext
from slmops.build.steps.divergence import log_softmax
from slmops.core.errors import BuildError
from slmops.runtimes import EngineSpec, open_engine
from slmops.runtimes.llama_cpp.logits import LogitModel

USES = (
    "slmops.build.conversations",
    "slmops.build.steps.divergence",
    "slmops.runtimes.llama_cpp.logits",
)
KEPT = 64
LONGEST_TOKENS = 256
#: one token in so many is watched instead of learned from, at most so many
WATCHED_SHARE, MOST_WATCHED_TOKENS = 8, 2048
#: tokens of one decode; student and teacher are not compared bit by bit
BATCH_TOKENS = 256


def text(context: StepContext) -> dict[str, Any]:
    """Render text to learn from, never from the evaluation set.

    Files in: ``model`` (its tokenizer and chat template), ``calibration``, maybe ``train``, ``system_prompt``,
    ``general-0``...; out: ``text.json`` (lists of token ids) and ``watch.json`` (others, never learned from: what tells whether
    learning helps). Params: ``tokens``: of the text to learn from, ``seed``.

    Raises:
        BuildError: there are not even two texts.
    """
    return asyncio.run(_text(context))


async def _text(context: StepContext) -> dict[str, Any]:
    files, learned = context.files, int(context.params["tokens"])
    watched = min(MOST_WATCHED_TOKENS, max(learned // WATCHED_SHARE, 1))
    wanted = learned + watched
    prompt = files["system_prompt"].read_text(encoding="utf-8").strip() if "system_prompt" in files else ""
    items = read_calibration(files["calibration"], prompt)
    if "train" in files:
        items = items + read_items(files["train"])
    general = [
        files[name].read_text(encoding="utf-8", errors="replace")
        for name in sorted(files)
        if name.startswith("general-")
    ]
    spec = EngineSpec(
        runtime="llama.cpp", model_path=files["model"], context_tokens=512, slots=1, repack=False
    )
    sequences: list[list[int]] = []
    async with open_engine(spec) as engine:
        end = (await engine.properties()).eos_token
        half = (
            wanted // 2 if general else 0
        )  # as much general text as text of the task, where there is enough
        for whole in general:
            token_ids = await engine.tokenize(whole[: half * 8], add_special=False, parse_special=False)
            sequences += [
                token_ids[at : at + LONGEST_TOKENS] for at in range(0, len(token_ids), LONGEST_TOKENS)
            ]
        sequences = _first(sequences, half)
        for item in shuffled(items, int(context.params["seed"])):
            if sum(map(len, sequences)) >= wanted:
                break
            asked = await engine.apply_template(item.messages)
            answer = await engine.tokenize(item.answer, add_special=False, parse_special=False)
            token_ids = [*asked, *answer, *([end] if end >= 0 and item.answer else [])]
            sequences.append(token_ids[:LONGEST_TOKENS])
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    random.Random(int(context.params["seed"])).shuffle(sequences)  # any beginning is a fair part of the whole
    if len(sequences) < 2:
        raise BuildError(
            f"there are {len(sequences)} texts to learn from, expected some 100",
            hint="give task.train, general_text, or more text in task.calibration",
        )
    watch = _first(sequences[:-1], watched)
    learn = _first(sequences[len(watch) :], learned)
    for name, chosen in (("text.json", learn), ("watch.json", watch)):
        (context.out / name).write_text(json.dumps(chosen, separators=(",", ":")), encoding="utf-8")
    return {
        "texts": len(learn),
        "tokens": sum(map(len, learn)),
        "watched_texts": len(watch),
        "watched_tokens": sum(map(len, watch)),
    }


def _first(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    chosen: list[list[int]] = []
    count = 0
    for sequence in sequences:
        if count >= tokens:
            break
        chosen.append(sequence)
        count += len(sequence)
    return chosen


def keep(context: StepContext) -> dict[str, Any]:
    """Keep a teacher's distributions at every position of the text.

    Files in: ``model`` (the teacher), ``text``, ``watch``; out: ``ids.npy`` (tokens, k) uint32, ``logprobs.npy`` (tokens, k)
    float16, likeliest first, in the order of ``learn.json``, then of what is watched; and ``learn.json``, the chosen sequences.
    Params: ``tokens``: how many of the text; ``fitted_tokens``: how many at its beginning the student was fitted to already: the
    others come first, because on text that it was fitted to a student looks better than it is, and learns next to nothing.
    Value: ``kept_mass``: mean probability of the kept tokens.
    """
    whole = json.loads(context.files["text"].read_text(encoding="utf-8"))
    fitted = _first(whole, int(context.params.get("fitted_tokens", 0)))
    learn = _first(whole[len(fitted) :] + fitted, int(context.params["tokens"]))
    (context.out / "learn.json").write_text(json.dumps(learn, separators=(",", ":")), encoding="utf-8")
    sequences = learn + json.loads(context.files["watch"].read_text(encoding="utf-8"))
    longest = max(len(sequence) for sequence in sequences)
    ids, logprobs = [], []
    with LogitModel(
        context.files["model"],
        context_tokens=math.ceil(longest / 64) * 64,
        threads=1,
        batch_tokens=BATCH_TOKENS,
    ) as model:
        for index, sequence in enumerate(sequences):
            rows = log_softmax(model.logits(sequence))
            count = min(KEPT, rows.shape[1])
            chosen = np.argpartition(rows, -count, axis=1)[:, -count:]
            values = np.take_along_axis(rows, chosen, axis=1)
            order = np.argsort(-values, axis=1, kind="stable")
            ids.append(np.take_along_axis(chosen, order, axis=1).astype(np.uint32))
            logprobs.append(np.take_along_axis(values, order, axis=1).astype(np.float16))
            context.progress((index + 1) / len(sequences), "teacher")
    np.save(context.out / "ids.npy", np.concatenate(ids))
    kept = np.concatenate(logprobs)
    np.save(context.out / "logprobs.npy", kept)
    mass = np.exp(kept.astype(np.float64)).sum(axis=1)
    return {"tokens": len(kept), "kept": kept.shape[1], "kept_mass": float(mass.clip(max=1.0).mean())}
