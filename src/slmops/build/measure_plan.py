"""The part of the graph that measures: answers, divergences, golden pack, speed, and what cuts and zeros cost."""

from __future__ import annotations

from typing import Any

from slmops.build.graph import Output, SourceFile, Step
from slmops.build.recipe_files import ReadRecipe, serving_of
from slmops.build.search_plan import chosen_by, serving_inputs
from slmops.build.step_names import (
    ASKED_PARENT,
    ASKED_REFERENCE,
    DISTRIBUTIONS,
    GOLDEN_REFERENCE,
    GOLDEN_TEXT,
    LIKELIHOOD_REFERENCE,
    PACK,
    SPARSITY,
    TEXT,
    of_target,
)
from slmops.build.weight_plan import Weights
from slmops.protocol.documents.recipe import Target
from slmops.protocol.documents.recipe_gates import Evaluation

PROMPT_TOKENS, DECODE_TOKENS = 128, 48

_DISTRIBUTIONS: dict[str, Output | SourceFile] = {
    "ids": Output(DISTRIBUTIONS, "ids.npy"),
    "logprobs": Output(DISTRIBUTIONS, "logprobs.npy"),
    "mass": Output(DISTRIBUTIONS, "tail-mass.npy"),
}


def answers_step(read: ReadRecipe, name: str, model: Output | SourceFile, evaluation: Evaluation) -> Step:
    """Ask a model the evaluation items; the step gets this name."""
    inputs: dict[str, Output | SourceFile] = {
        "model": model,
        "text": Output(TEXT),
        "eval": read.sources["eval"],
    }
    if "schema" in read.sources:
        inputs["schema"] = read.sources["schema"]
    params = {
        "task_items": evaluation.task_items,
        "constrained_items": evaluation.constrained_items,
        "seed": evaluation.seed,
    }
    return Step(name, "slmops.build.steps.answers:ask", inputs, params)


def golden_pack_steps(
    read: ReadRecipe, reference: Output, variant: Output, evaluation: Evaluation
) -> list[Step]:
    """Choose the pack, maybe on the smallest variant as it is and faulty, and score it with the reference."""
    inputs: dict[str, Output | SourceFile] = {
        "eval": read.sources["eval"],
        "answers": Output(ASKED_REFERENCE, "answers.jsonl"),
        "asked": Output(ASKED_REFERENCE),
    }
    params: dict[str, Any] = {
        "count": evaluation.golden_prompts,
        "max_drop_ratio": evaluation.golden_max_drop,
    }
    light = evaluation.golden_candidates <= evaluation.golden_prompts
    if not light:
        inputs |= {"reference": reference, "variant": variant}
        params |= {"candidates": evaluation.golden_candidates, "serving": serving_of(read.recipe)}
    exact = {**serving_of(read.recipe), "kv_cache": "f16"}
    steps = []
    if evaluation.golden_text_tokens:
        room = {
            "text_tokens": evaluation.golden_text_tokens,
            "context_tokens": read.recipe.serving.context_tokens,
        }
        steps.append(Step(GOLDEN_TEXT, "slmops.build.steps.golden_trace:cut", {"model": reference}, room))
        inputs["text"] = Output(GOLDEN_TEXT)
    return [
        *steps,
        Step(PACK, "slmops.build.steps.golden:select", inputs, params, light=light),
        Step(
            GOLDEN_REFERENCE,
            "slmops.build.steps.golden:score",
            {"model": reference, "pack": Output(PACK, "golden-pack.json")},
            {"serving": exact},
        ),
    ]


def measure_steps(
    read: ReadRecipe, target: Target, variant: Output, text: Output, evaluation: Evaluation
) -> list[Step]:
    """What a target's shipped file answers, how far it is from the reference, and its golden scores."""
    return [
        answers_step(read, of_target("answers", target), variant, evaluation),
        Step(
            of_target("likelihood", target),
            "slmops.build.steps.divergence:compare",
            {"model": variant, "text": text, **_DISTRIBUTIONS, **serving_inputs(read, target)},
            {"runtime": target.runtime},
        ),
        Step(
            of_target("golden scores", target),
            "slmops.build.steps.golden:score",
            {"model": variant, "pack": Output(PACK, "golden-pack.json"), **serving_inputs(read, target)},
            {"serving": serving_of(read.recipe), "trace": True},
        ),
    ]


def cut_steps(read: ReadRecipe, made: Weights, text: Output, evaluation: Evaluation) -> list[Step]:
    """The dense model's answers, and how far the cuts alone led from it."""
    inputs: dict[str, Output | SourceFile] = {"model": made.reference, "text": text, **_DISTRIBUTIONS}
    return [
        answers_step(read, ASKED_PARENT, made.parent, evaluation),
        Step(LIKELIHOOD_REFERENCE, "slmops.build.steps.divergence:compare", inputs, {"runtime": "llama.cpp"}),
    ]


def sparsity_step(
    read: ReadRecipe, target: Target, variant: Output, dense: Output, evaluation: Evaluation
) -> Step:
    """What zeros gained: the variant beside its dense twin of the same types. One target is measured, and said."""
    inputs: dict[str, Output | SourceFile] = {
        "dense": dense,
        "variant": variant,
        "imatrix": Output("imatrix", "imatrix.npz"),
        "choice": Output(chosen_by(read.recipe, target)),
    }
    others = [t.key for t in read.recipe.targets if t.key != target.key]
    params = speed_params(read, evaluation) | {"profile": target.key, "others": others}
    return Step(SPARSITY, "slmops.build.steps.sparsify:report", inputs, params, exclusive=True)


def speed_params(read: ReadRecipe, evaluation: Evaluation) -> dict[str, Any]:
    """What every measurement of speed is told."""
    return {
        "serving": serving_of(read.recipe),
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "repeats": evaluation.bench_repeats,
    }


def expect_step(target: Target, targets: tuple[Target, ...]) -> Step:
    """A target's golden expectations, from the scores of all variants."""
    inputs: dict[str, Output | SourceFile] = {
        "pack": Output(PACK, "golden-pack.json"),
        "chosen": Output(PACK),
        "reference": Output(GOLDEN_REFERENCE),
        "own": Output(of_target("golden scores", target)),
    }
    inputs |= {f"variant-{other.key}": Output(of_target("golden scores", other)) for other in targets}
    return Step(of_target("expectations", target), "slmops.build.steps.golden:expect", inputs, light=True)


def speed_step(read: ReadRecipe, target: Target, variant: Output, evaluation: Evaluation) -> Step:
    """Speed and memory of the shipped file on this machine, alone."""
    return Step(
        of_target("speed", target),
        "slmops.build.steps.speed:measure",
        {"model": variant, **serving_inputs(read, target)},
        speed_params(read, evaluation),
        exclusive=True,
    )
