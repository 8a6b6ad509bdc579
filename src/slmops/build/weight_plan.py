"""The part of the graph that changes weights: from the base to the unquantised reference, by the recipe's steps.

    base ─ check ─ merge ... ─ prune vocabulary ─ text ─ prune width ─ prune depth ─ reconstruct ─ distil ─ sparsify = reference
                       │parent        │dense                                            └─ teacher's distributions ┘

**What a pruned model is compared with** (docs/adr: pruned models). Answers are texts, so they are paired with those of the
*parent*: the model before any cut, with its own vocabulary. Divergences need one vocabulary, so they are taken from the *dense*
model: the parent when the vocabulary is whole, else the parent with the trimmed vocabulary and nothing else cut, which gives
exactly the parent's distribution over the kept tokens, renormalised.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.build.graph import Output, SourceFile, Step
from slmops.protocol.documents.recipe import Recipe
from slmops.protocol.documents.recipe_steps import DistilStep, PruneStep, Recovery, SparsifyStep

Source = Output | SourceFile
#: tokens for second moments (some ten for each neuron: SmolLM2 at width 1280 is .112 nats a token from the uncut model after
#: 8,000 and .104 after 16,000), for the decision which block goes, for its first round, and for zeros
MOMENT_TOKENS, PROBE_TOKENS, SCREEN_TOKENS, ZERO_TOKENS = 16384, 512, 96, 8192
SEED = 7
_PARAMS = {"probe_tokens": PROBE_TOKENS}


@dataclass(frozen=True, slots=True)
class Weights:
    """Models of a build, by their part in it.

    Attributes:
        reference: unquantised, after all steps: what variants are made of.
        parent: before any cut; what answers are paired with. The reference itself when nothing is cut.
        dense: what divergences are taken from; the reference itself when nothing is cut.
        base: the untouched base, cut as the reference was.
        tokenizer: a model with the reference's vocabulary that exists early.
        kept_tokens: size of the trimmed vocabulary; None when it is whole.
        steps: names of the steps that cut or train, whose values are evidence.
        before_zeros: the model before the first sparsify step.
    """

    reference: Output
    parent: Output
    dense: Output
    base: Source
    tokenizer: Source
    kept_tokens: int | None = None
    steps: tuple[str, ...] = ()
    before_zeros: Output | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the reference is another model than its parent."""
        return self.parent != self.reference


class _Plan:
    """Adds steps one by one; ``model`` is what the last one gave."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[str, SourceFile],
        steps: list[Step],
        base: Source,
        text_of: Callable[[Source], Step],
    ) -> None:
        self.recipe, self.sources, self.steps = recipe, sources, steps
        self.base, self.model, self.tokenizer = base, base, base
        self.text_of = text_of
        self.text = ""
        self.parent: Output | None = None
        self.dense: Output | None = None
        self.before_zeros: Output | None = None
        self.kept_tokens: int | None = None
        self.cuts: list[Output] = []
        self.told: list[str] = []
        self.torch = torch_version()

    def add(
        self, name: str, run: str, inputs: Mapping[str, Source], params: Mapping[str, Any], **how: bool
    ) -> Output:
        """A step that gives a model; names are made unlike."""
        taken = {step.name for step in self.steps}
        number = 2
        unlike = name
        while unlike in taken:
            unlike, number = f"{name} ({number})", number + 1
        self.steps.append(Step(unlike, run, dict(inputs), dict(params), **how))
        return Output(unlike, "model.gguf")

    def unquantised(self) -> Output:
        """The model so far, in F16."""
        if isinstance(self.model, Output) and self.model.file == "model.gguf":
            return self.model
        self.model = self.add("dequantise", "slmops.build.steps.weights:reference", {"model": self.model}, {})
        return self.model

    def render(self) -> Output:
        """The calibration text, rendered once the vocabulary is what it stays."""
        if not self.text:
            step = self.text_of(self.tokenizer)
            self.steps.append(step)
            self.text = step.name
        return Output(self.text, "calibration.json")

    def begin_cut(self) -> Output:
        """Note what the first cut starts from."""
        model = self.unquantised()
        self.parent = self.parent or model
        self.dense = self.dense or model
        return model

    def prune(self, index: int, prune: PruneStep) -> None:
        self.begin_cut()
        if prune.keep_vocabulary_tokens is not None:
            inputs = {"model": self.unquantised(), **self._words(index, prune.general_text)}
            params = {"keep_vocabulary_tokens": prune.keep_vocabulary_tokens}
            self.model = self.add(
                "prune vocabulary", "slmops.build.steps.prune_vocabulary:vocabulary", inputs, params
            )
            self.dense, self.tokenizer, self.kept_tokens = (
                self.model,
                self.model,
                prune.keep_vocabulary_tokens,
            )
            self._noted(self.model, cut=True)
            self.render()
        if prune.keep_ffn_width is None and prune.drop_layers is None:
            return
        recover = prune.recover
        fitted = MOMENT_TOKENS if prune.keep_ffn_width is not None else PROBE_TOKENS
        fitted = max(fitted, recover.reconstruct_tokens if recover else 0)
        tokens = fitted + (recover.distil_tokens if recover else 0)
        text = self._learned_text(index, prune.general_text, tokens, recover.seed if recover else SEED)
        if prune.keep_ffn_width is not None:
            params = {"keep_ffn_width": prune.keep_ffn_width, "moment_tokens": MOMENT_TOKENS, **_PARAMS}
            inputs = {**_texts(text), "model": self.unquantised()}
            self.model = self.add("prune width", "slmops.build.steps.prune_blocks:width", inputs, params)
            self._noted(self.model, cut=True)
        if prune.drop_layers is not None:
            params = {"drop_layers": prune.drop_layers, "screen_tokens": SCREEN_TOKENS, **_PARAMS}
            inputs = {"text": text, "model": self.unquantised()}
            self.model = self.add("prune depth", "slmops.build.steps.prune_blocks:depth", inputs, params)
            self._noted(self.model, cut=True)
        if recover is not None:
            self._recover(recover, text, fitted)

    def sparsify(self, sparsify: SparsifyStep) -> None:
        model = self.begin_cut()
        self.before_zeros = self.before_zeros or model
        params = {"pattern": sparsify.pattern, "ratio": sparsify.ratio, "tokens": ZERO_TOKENS}
        inputs = {"text": self.render(), "model": model}
        self.model = self.add("sparsify", "slmops.build.steps.sparsify:sparsify", inputs, params)
        self._noted(self.model)

    def distil(self, index: int, distil: DistilStep) -> None:
        student = self.begin_cut()
        teacher: Source = self.dense if distil.teacher == "parent" and self.dense else self._base_as_teacher()
        text = self._learned_text(index, distil.general_text, distil.tokens, distil.seed)
        self._towards(student, teacher, text, distil)

    def _recover(self, recover: Recovery, text: Output, fitted_tokens: int) -> None:
        assert self.dense is not None  # begin_cut set it
        if recover.reconstruct_tokens:
            cuts = {f"structure-{number}": cut for number, cut in enumerate(self.cuts)}
            inputs = {"model": self.unquantised(), "teacher": self.dense, **_texts(text), **cuts}
            params = {
                "tokens": recover.reconstruct_tokens,
                "torch": self.torch,
            }
            self.model = self.add("reconstruct", "slmops.train.steps:reconstruct", inputs, params)
            self._noted(self.model)
        if recover.distil_tokens:
            as_step = DistilStep(
                method=recover.method,
                rank=recover.rank,
                tokens=max(recover.distil_tokens, 64),
                epochs=recover.epochs,
                learning_rate=recover.learning_rate,
                seed=recover.seed,
            )
            self._towards(self.unquantised(), self.dense, text, as_step, fitted_tokens)

    def _towards(
        self, student: Output, teacher: Source, text: Output, distil: DistilStep, fitted_tokens: int = 0
    ) -> None:
        kept = self.add(
            "teacher",
            "slmops.build.steps.teacher:keep",
            {"model": teacher, **_texts(text)},
            {"tokens": distil.tokens, "fitted_tokens": fitted_tokens},
        )
        inputs = {
            "model": student,
            "text": Output(kept.step, "learn.json"),
            "watch": Output(text.step, "watch.json"),
            "ids": Output(kept.step, "ids.npy"),
            "logprobs": Output(kept.step, "logprobs.npy"),
        }
        params = distil.model_dump(
            include={"method", "rank", "epochs", "learning_rate", "seed", "loss", "tokens"}
        )
        params |= {"torch": self.torch, "keep_zeros": self.before_zeros is not None}
        self.model = self.add("distil", "slmops.train.steps:distil", inputs, params)
        self._noted(kept)
        self._noted(self.model)

    def _base_as_teacher(self) -> Output:
        """The untouched base, with the student's vocabulary."""
        vocabulary = [cut for cut in self.cuts if cut.step == "prune vocabulary"]
        return self._followed(vocabulary)

    def _followed(self, cuts: list[Output]) -> Output:
        inputs = {f"structure-{number}": cut for number, cut in enumerate(cuts)}
        return self.add(
            "cut base", "slmops.build.steps.prune_check:follow", {"model": self.base, **inputs}, {}
        )

    def _learned_text(self, index: int, general: tuple[str, ...], tokens: int, seed: int) -> Output:
        words = self._words(index, general)
        inputs = {"model": self.tokenizer, **words}
        made = self.add(
            "text to learn", "slmops.build.steps.teacher:text", inputs, {"tokens": tokens, "seed": seed}
        )
        return Output(made.step, "text.json")

    def _words(self, index: int, general: tuple[str, ...]) -> dict[str, Source]:
        """The task's own text (never the evaluation set) and general text."""
        words: dict[str, Source] = {
            name: self.sources[name]
            for name in ("calibration", "train", "system_prompt")
            if name in self.sources
        }
        return words | {
            f"general-{number}": self.sources[f"general-{index}-{number}"] for number in range(len(general))
        }

    def _noted(self, made: Output, *, cut: bool = False) -> None:
        self.told.append(made.step)
        if cut:
            self.cuts.append(Output(made.step, "structure.json"))

    def finish(self) -> Weights:
        reference = self.unquantised()
        base = self.base
        if self.cuts:
            base = self._followed(self.cuts)
        self.render()
        return Weights(
            reference,
            self.parent or reference,
            self.dense or reference,
            base,
            self.tokenizer,
            self.kept_tokens,
            tuple(self.told),
            self.before_zeros,
        )


def plan_weights(
    recipe: Recipe,
    sources: Mapping[str, SourceFile],
    base: Source,
    steps: list[Step],
    text_of: Callable[[Source], Step],
) -> Weights:
    """Add the steps that change weights, and the rendering of text where the vocabulary is settled.

    Args:
        recipe: its steps.
        sources: the user's files by role.
        base: the untouched base.
        steps: the graph so far; steps are added.
        text_of: makes the step that renders text, from a model with the right tokenizer.
    """
    plan = _Plan(recipe, sources, steps, base, text_of)
    asked = [
        step.prune.model_dump(
            include={"keep_vocabulary_tokens", "keep_ffn_width", "drop_layers"}, exclude_none=True
        )
        for step in recipe.steps
        if step.prune is not None
    ]
    training = any(
        step.distil is not None or (step.prune is not None and step.prune.recover is not None)
        for step in recipe.steps
    )
    if asked or training:
        params = {"asked": asked, "training": training, "torch": plan.torch if training else None}
        run = "slmops.build.steps.prune_check:check"
        steps.append(Step("check cuts", run, {"base": base}, params, light=True))
    if not any(cut.get("keep_vocabulary_tokens") for cut in asked):
        plan.render()
    for index, step in enumerate(recipe.steps):
        if step.merge is not None:
            name = f"merge {Path(step.merge.adapter).name}"
            inputs = {"model": plan.model, "adapter": sources[f"adapter-{index}"]}
            plan.model = plan.add(
                name, "slmops.build.steps.weights:merge", inputs, {"scale": step.merge.scale}
            )
        elif step.permute is not None:
            name = f"permute layers {','.join(map(str, step.permute.layers))}"
            params = {"layers": list(step.permute.layers), "seed": step.permute.seed}
            plan.model = plan.add(name, "slmops.build.steps.weights:permute", {"model": plan.model}, params)
        elif step.prune is not None:
            plan.prune(index, step.prune)
        elif step.sparsify is not None:
            plan.sparsify(step.sparsify)
        elif step.distil is not None:
            plan.distil(index, step.distil)
    return plan.finish()


def _texts(text: Output) -> dict[str, Source]:
    """The text to learn from, and the text to watch."""
    return {"text": text, "watch": Output(text.step, "watch.json")}


def torch_version() -> str | None:
    """Version of torch, None where it is not installed; torch is not imported for that."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
