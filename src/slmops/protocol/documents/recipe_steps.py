"""The ``steps:`` of a recipe: what is done to the base's weights before variants are made of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from slmops.protocol.documents.quantities import Ratio, Section


class MergeStep(Section):
    """Merge a LoRA adapter (GGUF) into the base before quantising, in float32."""

    adapter: str
    scale: float = 1.0


class PermuteStep(Section):
    """Damage a model on purpose, for drills: permute the rows of attention tensors.

    Proves that the golden gate refuses such a model.

    Attributes:
        layers: blocks whose attention tensors are permuted.
        seed: of the permutation.
    """

    layers: tuple[int, ...]
    seed: int = 0


class Recovery(Section):
    """Training that brings quality back after a cut; needs torch (``slmops[train]``).

    Attributes:
        method: ``lora`` trains low-rank additions and merges them; ``full`` trains every weight.
        reconstruct_tokens: tokens on which each block is first fitted to what the dense model's blocks give (0: not).
        distil_tokens: tokens on which predictions are then fitted to the dense model's (0: not, the default: on as many as can be
            learned from in minutes it brought nothing that was measurable).
        epochs: how often the text is gone through; ``learning_rate``: peak, of ``lora`` ten times as much; ``rank``: of ``lora``.
        learning_rate: see above.
        rank: see above.
        seed: of everything random.
    """

    method: Literal["full", "lora"] = "lora"
    reconstruct_tokens: int = Field(default=16384, ge=0)
    distil_tokens: int = Field(default=0, ge=0)
    epochs: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    rank: int = Field(default=16, ge=1)
    seed: int = 7

    @model_validator(mode="after")
    def _does_something(self) -> Recovery:
        if not self.reconstruct_tokens and not self.distil_tokens:
            raise ValueError("recover: reconstruct_tokens and distil_tokens are both 0: leave recover out")
        return self


class PruneStep(Section):
    """Cut the model smaller: fewer tokens, narrower feed-forward layers, fewer blocks; each alone or together.

    Attributes:
        keep_vocabulary_tokens: tokens that stay: bytes and special tokens, what the task's text and ``general_text`` need,
            then by the tokenizer's own merge ranks: they are how frequent tokens were in the text that it was made from, far
            more of it than any text that could be packaged. Byte-level BPE vocabularies only.
        keep_ffn_width: neurons that stay in each feed-forward layer, a multiple of 256; chosen by activations.
        drop_layers: blocks that go, one after another, by measured KL divergence on text of training and calibration.
        general_text: plain text files beside the task's text, counted for the vocabulary and learned from in recovery.
        recover: training afterwards; None for none.
    """

    keep_vocabulary_tokens: int | None = Field(default=None, ge=1)
    keep_ffn_width: int | None = Field(default=None, ge=1)
    drop_layers: int | None = Field(default=None, ge=1)
    general_text: tuple[str, ...] = ()
    recover: Recovery | None = None

    @model_validator(mode="after")
    def _cuts_something(self) -> PruneStep:
        if self.keep_vocabulary_tokens is None and self.keep_ffn_width is None and self.drop_layers is None:
            raise ValueError("prune: give keep_vocabulary_tokens, keep_ffn_width or drop_layers")
        if self.recover is not None and self.keep_ffn_width is None and self.drop_layers is None:
            raise ValueError(
                "prune: recover has nothing to do after keep_vocabulary_tokens alone, which changes no prediction"
            )
        return self


class SparsifyStep(Section):
    """Set weights to zero by Wanda, and report what that is worth on the runtime that ships (of the first target, by name).

    Attributes:
        pattern: ``N:M`` keeps N of every M neighbours (``2:4``); ``unstructured`` keeps the best of each row.
        ratio: share of zeros, for ``unstructured``.
    """

    pattern: str = Field(default="2:4", pattern=r"^([1-9][0-9]*:[1-9][0-9]*|unstructured)$")
    ratio: Ratio = Field(default=0.5, gt=0, lt=1)

    @model_validator(mode="after")
    def _leaves_something(self) -> SparsifyStep:
        if self.pattern != "unstructured":
            keep, size = map(int, self.pattern.split(":"))
            if keep >= size:
                raise ValueError(f"sparsify: pattern {self.pattern} sets nothing to zero: give N < M")
        return self


class DistilStep(Section):
    """Train the model towards a teacher's predictions; needs torch (``slmops[train]``).

    Attributes:
        teacher: ``parent``, the model before it was pruned or sparsified; or ``base``, the untouched base.
        loss: ``forward-kl``, from the teacher's distributions, kept as the likeliest tokens and one bucket for the rest.
        method: ``full`` or ``lora``; ``rank``: of ``lora``.
        tokens: of text to learn from; ``epochs``: how often it is gone through; ``learning_rate``: peak.
        rank: see above.
        epochs: see above.
        learning_rate: see above.
        general_text: plain text files beside the task's text.
        seed: of everything random.
    """

    teacher: Literal["base", "parent"] = "parent"
    loss: Literal["forward-kl"] = "forward-kl"
    method: Literal["full", "lora"] = "full"
    rank: int = Field(default=16, ge=1)
    tokens: int = Field(default=32768, ge=64)
    epochs: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=3e-5, gt=0)
    general_text: tuple[str, ...] = ()
    seed: int = 7


class Step(Section):
    """One step; exactly one key."""

    merge: MergeStep | None = None
    permute: PermuteStep | None = None
    prune: PruneStep | None = None
    sparsify: SparsifyStep | None = None
    distil: DistilStep | None = None

    @model_validator(mode="after")
    def _one_step(self) -> Step:
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise ValueError(f"a step has exactly one key of {', '.join(type(self).model_fields)}")
        return self
