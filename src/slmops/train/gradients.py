"""The build's steps that need torch for the search: second moments of gradients, and gradients projected on errors.

The work is :mod:`slmops.train.fisher`'s and :mod:`slmops.train.projected`'s.
Torch is imported when a step runs, not when the graph is planned: this module's sources decide the steps' keys. A model
that :mod:`slmops.train.llama` cannot read is no error: the first step says so, and the search goes on without gradients.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from slmops.core.errors import BaseModelError
from slmops.train.step_context import Context

USES = ("slmops.train.fisher", "slmops.train.llama", "slmops.train.projected")
EMBEDDING_INPUT, TOKEN_SHARE = "embedding input", "token share"
#: kind of error that damage is measured with; the build's name for it
PROBE = "probe"


def collect(context: Context) -> dict[str, Any]:
    """Collect them. Files in: ``model``, ``text``; out: ``gradients.npz``. Params: ``tokens``, ``seed``, ``torch`` (its version).

    Value: ``available``, ``tokens``, and when not available ``reason``. The file holds E[g_i^2] by tensor, and of the embedding's
    output ``embedding input`` and ``token share``.
    """
    import torch  # noqa: PLC0415 - see the module's docstring

    from slmops.train.fisher import moments  # noqa: PLC0415
    from slmops.train.llama import load_llama  # noqa: PLC0415

    torch.set_num_threads(1)
    target = context.out / "gradients.npz"
    context.progress(None, "reading weights")
    try:
        llama = load_llama(context.files["model"], torch.float32)
    except BaseModelError as error:
        np.savez(target)
        return {"available": False, "tokens": 0, "reason": error.message}
    found = moments(
        llama,
        _text(context.files["text"], int(context.params["tokens"])),
        seed=int(context.params["seed"]),
        progress=lambda ratio: context.progress(ratio, "gradients of sampled targets"),
    )
    vectors = {**found.rows, EMBEDDING_INPUT: found.embedding_input, TOKEN_SHARE: found.token_share}
    np.savez(target, **{name: vectors[name].astype(np.float32) for name in sorted(vectors)})  # type: ignore[arg-type]
    return {"available": True, "tokens": found.tokens}


def project(context: Context) -> dict[str, Any]:
    """Project gradients on errors. Files in: ``model``, ``text``, ``errors-1``... (of the steps that predict); no files out.

    Values in: ``gradients-facts``. Params: ``tokens``, ``seed``, ``torch`` (its version). Value: ``available``, ``reason``,
    ``tokens``, ``kld`` (tensor to type to nats a token) and ``probe``, as the steps that predict give them.
    """
    facts = context.values["gradients-facts"]
    if not facts["available"]:
        return {"available": False, "reason": facts["reason"], "tokens": 0, "kld": {}, "probe": {}}
    import torch  # noqa: PLC0415 - see the module's docstring

    from slmops.train.llama import load_llama  # noqa: PLC0415
    from slmops.train.projected import RowErrors, projected  # noqa: PLC0415

    torch.set_num_threads(1)
    errors: dict[str, RowErrors] = {}
    for name in sorted(name for name in context.files if name.startswith("errors-")):
        with np.load(context.files[name]) as stored:
            for tensor in sorted({entry.rpartition("/")[0] for entry in stored.files}):
                errors[tensor] = RowErrors(
                    tuple(str(kind) for kind in stored[f"{tensor}/kinds"]),
                    stored[f"{tensor}/rows"],
                    stored[f"{tensor}/weights"],
                    stored[f"{tensor}/errors"],
                    float(stored[f"{tensor}/unit"]),
                )
    context.progress(None, "reading weights")
    sequences = _text(context.files["text"], int(context.params["tokens"]))
    table = projected(
        load_llama(context.files["model"], torch.float32),
        sequences,
        errors,
        seed=int(context.params["seed"]),
        progress=lambda ratio: context.progress(ratio, "gradients projected on errors"),
    )
    probe = {name: row.pop(PROBE) for name, row in table.items()}
    tokens = sum(map(len, sequences))
    return {"available": True, "reason": "", "tokens": tokens, "kld": table, "probe": probe}


def _text(path: Path, tokens: int) -> list[list[int]]:
    """The first tokens of a text, sequence by sequence."""
    sequences: list[list[int]] = []
    for token_ids in json.loads(path.read_text(encoding="utf-8")):
        left = tokens - sum(map(len, sequences))
        if left <= 1:
            break
        sequences.append(token_ids[:left])
    return sequences
