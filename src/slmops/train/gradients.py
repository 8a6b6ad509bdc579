"""The build's step that needs torch for the search: second moments of gradients (:mod:`slmops.train.fisher`).

Torch is imported when the step runs, not when the graph is planned: this module's sources decide the step's key. A model
that :mod:`slmops.train.llama` cannot read is no error: the step says so, and the search goes on without gradients.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from slmops.core.errors import BaseModelError
from slmops.train.step_context import Context

USES = ("slmops.train.fisher", "slmops.train.llama")
EMBEDDING_INPUT, TOKEN_SHARE = "embedding input", "token share"


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
    sequences: list[list[int]] = []
    for token_ids in json.loads(context.files["text"].read_text(encoding="utf-8")):
        left = int(context.params["tokens"]) - sum(map(len, sequences))
        if left <= 1:
            break
        sequences.append(token_ids[:left])
    found = moments(
        llama,
        sequences,
        seed=int(context.params["seed"]),
        progress=lambda ratio: context.progress(ratio, "gradients of sampled targets"),
    )
    vectors = {**found.rows, EMBEDDING_INPUT: found.embedding_input, TOKEN_SHARE: found.token_share}
    np.savez(target, **{name: vectors[name].astype(np.float32) for name in sorted(vectors)})  # type: ignore[arg-type]
    return {"available": True, "tokens": found.tokens}
