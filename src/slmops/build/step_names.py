"""Names of a build's steps, by which results are found again."""

from __future__ import annotations

from slmops.protocol.documents.recipe import Target

DAMAGE_PARTS = 2

PREDICTION_PARTS = 2

#: processes that make a variant's tensors
TENSOR_PARTS = 2

#: only where gradients are projected: step, and the input by which the choice knows it
PROJECTION = "projections"

#: only where the recipe cuts or trains: the model before that, and what the cuts alone cost
ASKED_PARENT, LIKELIHOOD_REFERENCE, SPARSITY = "answers: dense", "likelihood: unquantised", "sparsity report"

SPEEDS = "speed of types"

#: only where a target is exported: the reference as exporters read it
EXPORT_SOURCE = "export source"
#: only where the search may choose how a model is served
KV_CACHES = "kv caches"
#: how much of the long text a golden pack holds
GOLDEN_TEXT = "golden text"

TEXT, PACK, ASKED_BASE, ASKED_REFERENCE, DISTRIBUTIONS, GOLDEN_REFERENCE = (
    "render text",
    "golden pack",
    "answers: base",
    "answers: unquantised",
    "distributions: unquantised",
    "golden scores: unquantised",
)


def of_target(kind: str, target: Target) -> str:
    """Name of a target's step."""
    return f"{kind}: {target.key}"
