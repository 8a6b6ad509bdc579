"""The parity gate of an export: the source in llama.cpp on one side, the exported files in their own engine on the other.

A step that fails leaves nothing, so an export that does not load or is another model fails the build and no variant is made
of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from slmops.build.conversations import read_items
from slmops.build.export.exported import Exported, exported, session
from slmops.build.export.formats import MODEL_FACTS, TOKENIZER_FILES
from slmops.build.export.tool_process import ToolProcess, Unable
from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.hf.sentencepiece import CONTROL, USER_DEFINED
from slmops.build.hf.write import facts_of, numbers_of, texts_of, value_of
from slmops.build.parity.checks import (
    Check,
    close_enough,
    divergences,
    same_answers,
    same_ids,
    same_in_steps,
    same_special,
    same_template,
)
from slmops.build.parity.texts import strings
from slmops.core.errors import BuildError
from slmops.runtimes import EngineSpec, open_engine
from slmops.runtimes.llama_cpp.logits import LogitModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

USES = (
    "slmops.build.conversations",
    "slmops.build.export.exported",
    "slmops.build.export.tool_process",
    "slmops.build.hf.write",
    "slmops.build.parity.checks",
    "slmops.build.parity.texts",
    "slmops.runtimes.llama_cpp.logits",
    "slmops.runtimes.llama_cpp.native",
)
ANSWER_TOKENS = 24
PROMPTS = 8
#: divergences are taken on at least this many positions of held-out text
POSITIONS = 512
LONGEST_SEQUENCE = 192


@dataclass(frozen=True)
class Source:
    """What the source says.

    Attributes:
        texts: the strings; ``ids``: of each.
        conversations, rendered: each conversation, and its prompt's text; ``prompts``: its ids.
        answers: greedy, of each prompt.
        sequences: token ids for divergences.
    """

    texts: list[str]
    ids: list[list[int]]
    conversations: list[list[dict[str, str]]]
    rendered: list[str]
    prompts: list[list[int]]
    answers: list[list[int]]
    sequences: list[list[int]]


def gate(context: StepContext) -> dict[str, Any]:
    """Compare. Files in: ``model`` (the reference), ``text`` (held-out), ``eval``, and the variant's under ``variant/``.

    Params: ``runtime``, ``precision``, ``toolchain``. Value: every check with its figures, the thresholds, and digest of the
    files that were compared.

    Raises:
        BuildError: the export does not load, or a check failed: names each with its first difference and cause.
    """
    with exported(context) as variant:
        with LogitModel(context.files["model"], context_tokens=1024) as model:
            context.progress(0.05, "parity: asking the source")
            source = _source(context, model)
            context.progress(0.2, f"parity: loading the export in {variant.form.runtime}")
            with session(context, variant) as (tool, loaded):
                checks = _compare(context, variant, source, model, tool, loaded)
        thresholds = variant.form.thresholds
        result = {
            "runtime": variant.form.runtime,
            "precision": variant.form.precision,
            "runtime_version": loaded.get("runtime_version", ""),
            "thresholds": {name: getattr(thresholds, name) for name in thresholds.__dataclass_fields__},
            "checks": [check.document() for check in checks],
            "model_sha256": variant.sha256,
        }
    failed = [check for check in checks if not check.passed]
    if failed:
        lines = "\n  ".join(check.line() for check in failed)
        raise BuildError(
            f"{variant.form.runtime} {variant.form.precision}: the export is not the model it was made from:\n  {lines}",
            hint="no variant was made. Choose another precision or runtime for this target; other token ids or another template "
            "are an error of the exporter or of its engine, whatever the precision",
        )
    return result


def _source(context: StepContext, model: LogitModel) -> Source:
    with open_gguf(context.files["model"]) as opened:
        texts = strings(tuple(special_texts(opened).values()))
    items = read_items(context.files["eval"])[:PROMPTS]
    conversations = [[dict(message) for message in item.messages] for item in items]
    conversations += [
        [{"role": "user", "content": "  What is 12 + 34?\n"}],
        [
            {"role": "system", "content": "You answer briefly."},
            {"role": "user", "content": "Kuka keksi sähkön?"},
            {"role": "assistant", "content": "Ei kukaan.\n"},
            {"role": "user", "content": "为什么？ 🙂"},
        ],
    ]
    rendered = asyncio.run(_rendered(context.files["model"], conversations))
    prompts = [model.tokenize(text, add_special=True, parse_special=True) for text in rendered]
    short = [
        prompt[-LONGEST_SEQUENCE:] if len(prompt) > 3 * LONGEST_SEQUENCE else prompt for prompt in prompts
    ]
    answers = [model.greedy(prompt, max_tokens=ANSWER_TOKENS) for prompt in short]
    sequences: list[list[int]] = []
    for sequence in json.loads(context.files["text"].read_text(encoding="utf-8")):
        if sum(map(len, sequences)) >= POSITIONS:
            break
        sequences.append(list(sequence["token_ids"][-LONGEST_SEQUENCE:]))
    ids = [model.tokenize(text, parse_special=True) if text else [] for text in texts]
    return Source(texts, ids, conversations, rendered, short, answers, sequences)


async def _rendered(path: Path, conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
    """Prompts as the source's own engine renders them."""
    spec = EngineSpec(runtime="llama.cpp", model_path=path, context_tokens=512, slots=1, repack=False)
    async with open_engine(spec) as engine:
        transport = httpx.AsyncHTTPTransport(uds=str(engine.socket_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None) as client:
            answers = [
                await client.post("/apply-template", json={"messages": list(messages)})
                for messages in conversations
            ]
    for answer in answers:
        if answer.is_error:
            raise BuildError(
                f"the source's chat template fails: {answer.text[:300]}", hint="correct base.chat_template"
            )
    return [str(answer.json()["prompt"]) for answer in answers]


def special_texts(model: Any) -> dict[int, str]:
    """Texts of special tokens by id."""
    kinds = numbers_of(model, "tokenizer.ggml.token_type")
    tokens = texts_of(model, "tokenizer.ggml.tokens")
    return {at: tokens[at] for at, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)}


def _compare(
    context: StepContext,
    variant: Exported,
    source: Source,
    model: LogitModel,
    tool: ToolProcess,
    loaded: dict[str, Any],
) -> list[Check]:
    limits = variant.form.thresholds
    with open_gguf(context.files["model"]) as opened:
        facts = facts_of(opened)
        special = special_texts(opened)
        template = str(value_of(opened, "tokenizer.chat_template", ""))
    checks = [_same_documents(variant, facts.document(variant.form.precision), template, loaded)]
    context.progress(0.25, f"parity: {len(source.texts)} strings")
    checks += _ids(source, tool, bos=facts.bos_token, special=special)
    try:
        rendered = tool.ask(op="render", conversations=source.conversations)
        bos = special.get(facts.bos_token, "") if facts.bos_token is not None else ""
        checks.append(same_template(source.conversations, source.rendered, rendered, bos_text=bos))
    except Unable as error:
        note = f"rendered by slmops from {TOKENIZER_FILES[2]}, whose bytes were compared: {error}"
        checks.append(Check("chat template", True, 0, note=note))
    context.progress(0.4, "parity: greedy answers")
    answers: list[list[int]] = []
    for at, prompt in enumerate(source.prompts):
        answers += tool.ask(op="generate", prompts=[prompt], max_tokens=ANSWER_TOKENS)
        context.progress(0.4 + 0.2 * (at + 1) / len(source.prompts), "parity: greedy answers")
    margins = [_margin(model, *one) for one in zip(source.prompts, source.answers, answers, strict=True)]
    checks.append(
        same_answers(
            source.answers,
            answers,
            first_tokens=limits.greedy_tokens,
            margins=margins,
            even_nats=limits.even_nats,
        )
    )
    try:
        checks += _divergence(context, variant, source, model, tool, answers)
    except Unable as error:
        note = f"the engine gives no logits: {error}"
        checks.append(Check("divergence", True, 0, note=note))
    return checks


def _same_documents(variant: Exported, facts: dict[str, Any], template: str, loaded: dict[str, Any]) -> Check:
    """Special tokens as the export's documents and its engine have them; the template's file byte for byte."""
    written = json.loads((variant.folder / MODEL_FACTS).read_text(encoding="utf-8"))
    export = {name: written[name] for name in ("bos_token", "eos_tokens", "add_bos")}
    if "eos" in loaded:
        export["eos_tokens"] = loaded["eos"]
    if "bos" in loaded and facts["bos_token"] is not None:
        export["bos_token"] = loaded["bos"]
    check = same_special(facts, export)
    path = variant.folder / TOKENIZER_FILES[2]
    found = path.read_bytes() if path.is_file() else b""
    if check.passed and found != template.encode():
        return Check(
            "chat template file",
            False,
            1,
            1,
            f"{path.name}: {len(found)} bytes, the source's has {len(template.encode())}",
        )
    return check


def _ids(source: Source, tool: ToolProcess, *, bos: int | None, special: dict[int, str]) -> list[Check]:
    """Ids by the tokenizer that serves; and, told but not asked for, by the engine's own where slmops serves with another."""
    export = tool.ask(op="tokenize", texts=source.texts)
    checks = [same_ids(source.texts, source.ids, export, bos=bos, special=special)]
    with contextlib.suppress(Unable):
        own = tool.ask(op="tokenize", texts=source.texts, own=True)
        found = same_ids(source.texts, source.ids, own, bos=bos, special=special)
        note = "slmops serves with tokenizer.json and not with this; an application that drives the engine itself meets it"
        checks.append(replace(found, name="the engine's own tokenizer", passed=True, note=note))
    return checks


def _margin(model: LogitModel, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """How much surer the source is of its own token where two answers part, nats; infinite where one just ends."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        return float("inf") if len(ours) != len(theirs) else 0.0
    row = model.logits([*prompt, *ours[:at]])[-1]
    return float(row[ours[at]] - row[theirs[at]])


def _divergence(
    context: StepContext,
    variant: Exported,
    source: Source,
    model: LogitModel,
    tool: ToolProcess,
    answers: Sequence[Sequence[int]],
) -> list[Check]:
    limits = variant.form.thresholds
    klds: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    for at, sequence in enumerate(source.sequences):
        kld, top = divergences(model.logits(sequence), tool.logits(sequence))
        klds.append(kld)
        same.append(top)
        mean = float(np.concatenate(klds).mean())
        context.progress(
            0.6 + 0.35 * (at + 1) / len(source.sequences), f"parity: KL divergence so far {mean:.4f}"
        )
    asked = [(prompt, answer[0]) for prompt, answer in zip(source.prompts, answers, strict=True) if answer][
        :3
    ]
    rows = (
        np.stack([tool.logits(prompt)[-1] for prompt, _ in asked]) if asked else np.zeros((0, 1), np.float32)
    )
    return [
        close_enough(
            np.concatenate(klds),
            np.concatenate(same),
            kld_mean=limits.kld_mean,
            kld_p99=limits.kld_p99,
            same_top_ratio=limits.same_top_ratio,
        ),
        same_in_steps(rows, [first for _, first in asked], [int(row.argmax()) for row in rows]),
    ]
