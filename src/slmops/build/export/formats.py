"""Which runtimes a model can be exported to, in which precisions, with which options: a closed list.

An export is refused before any work where it is known that its file does not load, crashes, or answers badly; the reason is
told. Measured on SmolLM2-135M with the versions of ``toolchains/*/lock.txt``; a newer lock must measure again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slmops.core.errors import DocumentError

LLAMA_CPP = "llama.cpp"
MODEL_FACTS = "slmops-model.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What the parity gate asks of a precision, against the unquantised source.

    Attributes:
        kld_mean, kld_p99: nats a token, at most.
        same_top_ratio: share of positions whose likeliest token is the source's, at least.
        greedy_tokens: first tokens of greedy answers that must be the source's.
    """

    kld_mean: float
    kld_p99: float
    same_top_ratio: float
    greedy_tokens: int

    @property
    def even_nats(self) -> float:
        """Two tokens that the source holds this near to each other may change places.

        A divergence of k comes of log-probabilities that are off by sqrt(2k) (its second-order term), so the
        difference of two of them is off by 2 sqrt(k): at the most divergence that is allowed.
        """
        return 2 * math.sqrt(self.kld_mean)


#: fp32 differs by the order of sums alone. int8 is held to what such files cost where they are made well, with room for another
#: small model: SmolLM2-135M has KL 0.006 (onnxruntime-genai) and 0.032 (LiteRT, whose activations are int8 as well). int4 has to
#: be better than llama.cpp's plain Q4_0 of the same source, measured on the same text: 0.43, 3.5, 0.77.
EXACT = Thresholds(kld_mean=0.001, kld_p99=0.01, same_top_ratio=0.99, greedy_tokens=16)
INT8 = Thresholds(kld_mean=0.05, kld_p99=0.5, same_top_ratio=0.90, greedy_tokens=1)
INT4 = Thresholds(kld_mean=0.35, kld_p99=3.0, same_top_ratio=0.78, greedy_tokens=0)


@dataclass(frozen=True, slots=True)
class Format:
    """One way to export.

    Attributes:
        runtime: that serves it; ``precision``: of its weights.
        toolchain: folder under ``toolchains/``; ``tool``: script under ``tools/``.
        model: name of the file that the engine opens; ``kind``: its format in ``build.json``.
        thresholds: of the parity gate.
        options: what the script is told, besides paths.
        calibrated: whether the script is given the build's calibration text.
        served: False for formats that are exported and proved, and that no runtime of slmops serves.
        slow: takes minutes of CPU for a small model: named as such where it runs.
    """

    runtime: str
    precision: str
    toolchain: str
    tool: str
    model: str
    kind: str
    thresholds: Thresholds
    options: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    served: bool = True
    slow: bool = False


_K_QUANT = {
    "algo_config": "k_quant",
    "is_symmetric": "false",
    "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8",
}


#: tokens that an ExecuTorch program takes at once: room for the logits of all of them is set aside when it is loaded
_PIECES = {"piece_tokens": 128}


def _genai(precision: str, thresholds: Thresholds, options: Mapping[str, Any]) -> Format:
    extra = {"extra_options": dict(options)}
    return Format(
        "onnxruntime-genai",
        precision,
        "onnxruntime-genai",
        "genai",
        "genai_config.json",
        "json",
        thresholds,
        extra,
    )


#: int4 by groups, rounded by us: by rows (the exporter's own int4) the model answers badly, perplexity 44.8 where fp32 has 9.6
_BLOCKWISE = "blockwise"


def _litert(runtime: str, precision: str, thresholds: Thresholds, recipe: str) -> Format:
    bundled = runtime == "litert-lm"
    suffix = "litertlm" if bundled else "tflite"
    options: dict[str, Any] = {"quantization_recipe": recipe, "bundle": bundled, "prefill_lengths": [64, 256]}
    if recipe == _BLOCKWISE:
        options["group_size"] = 32
    return Format(
        runtime,
        precision,
        "litert",
        "litert",
        f"model.{suffix}",
        suffix,
        thresholds,
        options,
        calibrated=recipe == _BLOCKWISE,
        slow=True,
    )


FORMATS: tuple[Format, ...] = (
    _genai("fp32", EXACT, {}),
    _genai("int8", INT8, {}),
    _genai("int4", INT4, _K_QUANT),
    _litert("litert-lm", "fp32", EXACT, "none"),
    _litert("litert-lm", "int8", INT8, "dynamic_wi8_afp32"),
    _litert("litert-lm", "int4", INT4, _BLOCKWISE),
    _litert("litert", "fp32", EXACT, "none"),
    _litert("litert", "int8", INT8, "dynamic_wi8_afp32"),
    _litert("litert", "int4", INT4, _BLOCKWISE),
    Format("executorch", "fp32", "executorch", "pte", "model.pte", "pte", EXACT, _PIECES, slow=True),
    Format(
        "executorch",
        "8da4w",
        "executorch",
        "pte",
        "model.pte",
        "pte",
        INT4,
        {**_PIECES, "group_size": 32},
        calibrated=True,
        slow=True,
    ),
    Format("pytorch-mobile", "fp32", "executorch", "ptl", "model.ptl", "ptl", EXACT, served=False, slow=True),
)

#: (runtime, precision) -> why it is refused; measured, and measured again with every new lock
REFUSED: dict[tuple[str, str], str] = {
    ("onnxruntime-genai", "fp16"): "on CPU it loads and crashes when it generates: take fp32, int8 or int4",
    ("pytorch-mobile", "int8"): "dynamic int8 answers badly (perplexity 31.3 where fp32 has 9.6): take "
    "runtime: executorch, its successor",
    (
        "executorch",
        "int4",
    ): "its 4-bit form is called 8da4w (8-bit activations, 4-bit weights): write precision: 8da4w",
}

#: options that the onnxruntime-genai builder takes with exit code 0, for folders that its engine then does not load: measured
#: with the version of the lock
_UNLOADABLE_GENAI: tuple[tuple[Mapping[str, str], str], ...] = (
    ({"exclude_embeds": "true"}, "the engine then says 'Model input was not found: input_ids'"),
    ({"exclude_lm_head": "true"}, "the engine then says 'Model output was not found: logits'"),
    ({"config_only": "true"}, "the builder then leaves no model"),
)


def format_of(runtime: str, precision: str | None) -> Format:
    """The format of a target.

    Args:
        runtime: its name.
        precision: None takes the runtime's usual one.

    Raises:
        DocumentError: no such format, or one that is known to give bad files.
    """
    known = [one for one in FORMATS if one.runtime == runtime]
    if not known:
        runtimes = ", ".join(dict.fromkeys([LLAMA_CPP, *(one.runtime for one in FORMATS)]))
        raise DocumentError(f"runtime {runtime!r}: nothing exports to it", hint=f"one of {runtimes}")
    wanted = precision or _DEFAULT_PRECISION.get(runtime, "fp32")
    if (runtime, wanted) in REFUSED:
        raise DocumentError(
            f"runtime {runtime!r} with precision {wanted!r} is refused: {REFUSED[runtime, wanted]}",
            hint=f"precisions of {runtime}: {', '.join(one.precision for one in known)}",
        )
    for one in known:
        if one.precision == wanted:
            return one
    raise DocumentError(
        f"runtime {runtime!r} has no precision {wanted!r}",
        hint=f"one of {', '.join(one.precision for one in known)}",
    )


_DEFAULT_PRECISION = {
    "onnxruntime-genai": "int4",
    "litert-lm": "int8",
    "litert": "int8",
    "executorch": "fp32",
}


def refuse_options(runtime: str, options: Mapping[str, str]) -> None:
    """Refuse option sets of an exporter that are known to give files that do not load, and options that none takes.

    Raises:
        DocumentError: says which options, and why.
    """
    if runtime != "onnxruntime-genai":
        if options:
            raise DocumentError(
                f"{runtime}: its exporter takes no options, got {', '.join(sorted(options))}",
                hint="leave options out: onnxruntime-genai's builder alone takes some",
            )
        return
    for bad, reason in _UNLOADABLE_GENAI:
        if all(options.get(name, "").lower() == value.lower() for name, value in bad.items()):
            pairs = ", ".join(f"{name}={value}" for name, value in bad.items())
            raise DocumentError(
                f"{runtime}: options {pairs} are refused: {reason}", hint="leave these options out"
            )
