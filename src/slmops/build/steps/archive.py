"""One archive of an export for a profile without an agent: the files, the golden pack, its expectations, a short how-to.

Android and iOS applications load a model by themselves; slmops proves it and hands it over. The archive is a
plain tar with fixed times and owners, so that the same files give the same bytes; weights do not compress.
"""

from __future__ import annotations

import io
import tarfile
from typing import Any

from slmops.build.export.exported import ROLE
from slmops.build.export.formats import Format, format_of
from slmops.build.files import sha256_of_file
from slmops.build.graph import StepContext

USES = ("slmops.build.export.exported",)
ARCHIVE = "archive.tar"
_LOADING = {
    "litert-lm": "Load {model} with LiteRT-LM (Android: com.google.ai.edge.litertlm; iOS and desktop: its C++ or Python "
    "engine). Render the prompt by chat_template.jinja yourself and give the text to a session whose own prompt template is off "
    "(Python: `create_session(apply_prompt_template=False)`): its conversations hand templates the content in parts, on which "
    "templates that join texts fail.",
    "litert": "Load {model} with LiteRT's Interpreter or CompiledModel; signatures `prefill_64`, `prefill_256` and "
    "`decode`, with the KV cache as inputs and outputs. Tokenise with tokenizer.json, render with chat_template.jinja.",
    "executorch": "Load {model} with ExecuTorch's LLM runner (Android: org.pytorch:executorch-android; iOS: "
    "ExecuTorchLLM), with the XNNPACK, custom and quantised kernels linked in. Tokenise with tokenizer.json.",
    "onnxruntime-genai": "Load this folder with ONNX Runtime GenAI (Android: onnxruntime-genai-android). Tokenise with "
    "tokenizer.json where you can: the engine's own reader splits digits of other scripts otherwise (see the evidence).",
    "pytorch-mobile": "Load {model} with PyTorch Mobile's lite interpreter (`LiteModuleLoader`): token ids of shape (1, n) "
    "in, logits of shape (1, n, vocabulary) out, no KV cache. Its successor is ExecuTorch: prefer a .pte for anything new.",
}


def archive(context: StepContext) -> dict[str, Any]:
    """Write ``archive.tar``.

    Files in: the variant's, ``pack``, ``expectations``. Values in: ``export``. Params: ``runtime``,
    ``precision``, ``name`` (of the model), ``profile``. Value: size and digest, and the names inside.
    """
    params = context.params
    form = format_of(params["runtime"], params["precision"])
    inside = {
        **{name.removeprefix(ROLE): path for name, path in context.files.items() if name.startswith(ROLE)},
        "golden-pack.json": context.files["pack"],
        "golden-expectations.json": context.files["expectations"],
    }
    target = context.out / ARCHIVE
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as made:
        _add(
            made,
            "HOWTO.md",
            howto(form, params["name"], params["profile"], context.values["export"]).encode(),
        )
        for name, path in sorted(inside.items()):
            entry = _entry(name, path.stat().st_size)
            with path.open("rb") as content:
                made.addfile(entry, content)
    return {
        "bytes": target.stat().st_size,
        "sha256": sha256_of_file(target),
        "files": ["HOWTO.md", *sorted(inside)],
    }


def howto(form: Format, model: str, profile: str, export: dict[str, Any]) -> str:
    """The how-to's text."""
    facts = export["model"]
    files = "\n".join(
        f"- `{name}`: {file['bytes']} bytes, sha256 {file['sha256']}"
        for name, file in export["files"].items()
    )
    begins = "begins with BOS" if facts["add_bos"] else "does not begin with BOS"
    return f"""# {model} for {profile}: {form.runtime}, {form.precision}

There is no slmops agent for this profile: this archive is what an application ships. Nothing here updates or
reverts by itself.

1. Check the files against the digests below.
2. {_LOADING[form.runtime].format(model=form.model)}
3. Context: {facts["context_tokens"]} tokens. A plain text {begins}. These tokens end an answer: {facts["eos_tokens"]}.
4. Before you ship it on a new device, run the golden pack. For each prompt of `golden-pack.json`:
   - render `messages` by chat_template.jinja with `add_generation_prompt`, and tokenise that by tokenizer.json (nothing added in
     front); then tokenise `answer` for itself, and append its ids;
   - SHA-256 of all ids, decimal with commas between them, must be `tokens_sha256` of `golden-expectations.json`: if not,
     tokenizer or template are not wired as they should be, and nothing else counts;
   - the mean log-probability of the answer's ids must be within `tolerance` of `reference_logprob`. Where an engine tells no
     log-probabilities (LiteRT-LM), its greedy answer must be `answer`; `slmops-text` is left out then.

## Files
{files}
"""


def _add(made: tarfile.TarFile, name: str, content: bytes) -> None:
    made.addfile(_entry(name, len(content)), io.BytesIO(content))


def _entry(name: str, size_bytes: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size_bytes, 0o644, 0
    return entry
