"""Before and beside pruning: refusing what cannot be pruned before any work is done, and cutting the base alike."""

from __future__ import annotations

import re
import shutil
from typing import Any

from slmops.build.gguf_file import GgufFile, open_gguf
from slmops.build.graph import StepContext
from slmops.build.structure import Structure, check_depth, check_width, cut
from slmops.build.vocabulary import kept_tokens, read_vocabulary
from slmops.core.errors import BuildError, UsageError

USES = (
    "slmops.artifact.gguf_layout",
    "slmops.build.gguf_file",
    "slmops.build.structure",
    "slmops.build.vocabulary",
    "slmops.runtimes.llama_cpp.quantise",
)
#: what the trainer computes; see slmops.train.llama
TRAINABLE = ("llama",)
_TRAINABLE_TENSOR = re.compile(
    r"^(token_embd|output|output_norm)\.weight$"
    r"|^blk\.\d+\.(attn_norm|ffn_norm|attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down)\.weight$"
)


def check(context: StepContext) -> dict[str, Any]:
    """Refuse what could not be done, by name, before any work.

    Files in: ``base``. Params: ``asked`` (list of settings: ``keep_vocabulary_tokens``, ``keep_ffn_width``, ``drop_layers``),
    ``training`` (whether a step trains), ``torch`` (its version; None where it is missing).

    Raises:
        BaseModelError: this kind of model cannot be pruned like that.
        UsageError: a number does not fit the model.
        BuildError: a step trains, and torch is missing or the trainer cannot read the architecture.
    """
    params = context.params
    with open_gguf(context.files["base"]) as base:
        shape = base.layout.shape()
        layers, ffn = shape.layers, shape.ffn
        for asked in params["asked"]:
            if "keep_vocabulary_tokens" in asked:
                kept_tokens(read_vocabulary(base), {}, asked["keep_vocabulary_tokens"])
            if "keep_ffn_width" in asked:
                check_width(base, asked["keep_ffn_width"])
                if asked["keep_ffn_width"] >= ffn:
                    raise UsageError(
                        f"keep_ffn_width {asked['keep_ffn_width']}: an earlier step already left {ffn}",
                        hint="give each prune step a smaller width than the one before",
                    )
                ffn = asked["keep_ffn_width"]
            if "drop_layers" in asked:
                check_depth(base, asked["drop_layers"])
                layers -= asked["drop_layers"]
        if layers < 1:
            raise UsageError(
                f"drop_layers: all steps together drop {shape.layers - layers} of {shape.layers} blocks",
                hint=f"drop at most {shape.layers - 1}",
            )
        if params["training"] and params["torch"] is None:
            raise BuildError(
                "the recipe asks for training (recover or distil), and torch is not installed here",
                hint="pip install 'slmops[train]', or leave recover and distil out of the recipe: pruning works without",
            )
        if params["training"]:
            _check_trainable(base)
    return {"layers": layers, "ffn": ffn}


def _check_trainable(base: GgufFile) -> None:
    """Refuse what the trainer would compute otherwise than the engine does."""
    odd = next((t.name for t in base.layout.tensors if not _TRAINABLE_TENSOR.match(t.name)), None)
    scaling = base.layout.metadata.get(f"{base.layout.architecture}.rope.scaling.type", "none")
    if base.layout.architecture not in TRAINABLE:
        what = f"architecture {base.layout.architecture!r} cannot be trained (can: {', '.join(TRAINABLE)})"
    elif odd is not None or scaling != "none":
        what = f"the trainer does not know {odd or f'rope scaling {scaling!r}'}"
    else:
        return
    raise BuildError(
        f"the recipe asks for training (recover or distil), and {what}",
        hint="leave recover and distil out of the recipe: pruning works without",
    )


def follow(context: StepContext) -> dict[str, Any]:
    """Cut another model as a pruned one was cut, so that tensors of one name are comparable.

    Files in: ``model``, ``structure-0``... in the order of the cuts; out: ``model.gguf``.
    """
    current = context.files["model"]
    names = sorted(
        (name for name in context.files if name.startswith("structure-")), key=lambda name: int(name[10:])
    )
    for name in names:
        following = context.out / f".{name}.gguf"
        with open_gguf(current) as model:
            cut(following, model, Structure.decode(context.files[name].read_bytes()))
        if current.parent == context.out:
            current.unlink()
        current = following
    shutil.move(current, context.out / "model.gguf")
    return {"cuts": len(names), "bytes": (context.out / "model.gguf").stat().st_size}
