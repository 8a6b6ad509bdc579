"""The ``gates:`` and ``evaluation:`` of a recipe: what a variant must show, and on how much it is measured."""

from __future__ import annotations

from pydantic import Field, model_validator

from slmops.protocol.documents.quantities import Ratio, Section


class Slices(Section):
    """Ask a paired gate of every part of the evaluation set as well.

    Attributes:
        by: a field of the items (``intent``), or one of their JSON answers (``answer.intent``).
        min_items: parts with fewer items are judged together, as one part ``(others)``.
        max_drop: of a part; None takes the gate's.
    """

    by: str = Field(min_length=1)
    min_items: int = Field(default=30, ge=1)
    max_drop: Ratio | None = None


class GateSpec(Section):
    """A question that a variant must answer with its shipped file.

    Estimated figures (``kld.*``, ``same_top.ratio``, ``flips.ratio``, ``perplexity``) are judged by their confidence interval: a
    bound inside it is inconclusive. ``min`` and ``max`` of a task metric are of the rate on this evaluation set, as it is.

    Attributes:
        metric: ``task.exact_match``, ``task.schema_valid``, ``task.schema_valid_constrained``, ``kld.mean``, ``kld.p99``,
            ``same_top.ratio``, ``flips.ratio`` (greedy answers that differ from the unquantised model's), ``perplexity``,
            ``decode_tps``, ``rss_bytes``.
        max_drop: absolute, paired, against the base step (the merged, unquantised model); ``min``/``max``: of
            the value itself.
        confidence: one-sided.
        slices: ask of parts of the evaluation set, too.
    """

    metric: str
    max_drop: Ratio | None = None
    min: float | None = None
    max: float | None = None
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    slices: Slices | None = None

    @model_validator(mode="after")
    def _can_fail(self) -> GateSpec:
        if self.max_drop is None and self.min is None and self.max is None:
            raise ValueError(f"gate {self.metric} has neither max_drop, min nor max: it could never fail")
        if self.max_drop is not None and not self.metric.startswith("task."):
            raise ValueError(
                f"gate {self.metric}: max_drop is for task metrics, which are paired item by item; use min or max"
            )
        if self.slices is not None and self.max_drop is None:
            raise ValueError(f"gate {self.metric}: slices are for max_drop, which is paired item by item")
        return self


class WarningLights(Section):
    """When early warnings turn amber and red. They need no labels, and stop nothing unless a gate asks the same figure.

    Each is [amber from, red from], for models of about four bits a weight. Recalibrate when a line of models is known: take what
    its variants that served well have shown.

    Attributes:
        kld_mean: nats a token against the unquantised model; ``kld_p99``: of the worst token in a hundred.
        flips_ratio: share of greedy answers that differ; ``top_flips_ratio``: share of tokens whose likeliest successor differs.
    """

    kld_mean: tuple[float, float] = (0.03, 0.1)
    kld_p99: tuple[float, float] = (0.2, 1.0)
    flips_ratio: tuple[float, float] = (0.03, 0.08)
    top_flips_ratio: tuple[float, float] = (0.09, 0.15)

    @model_validator(mode="after")
    def _in_order(self) -> WarningLights:
        for name in type(self).model_fields:
            amber, red = getattr(self, name)
            if not 0 <= amber <= red:
                raise ValueError(
                    f"{name}: expected [amber, red] with 0 <= amber <= red, got [{amber}, {red}]"
                )
        return self


class Evaluation(Section):
    """How much is measured; less for a quick look.

    Attributes:
        text_tokens: held-out tokens for KL divergence, same-top and perplexity.
        task_items: items of the evaluation set that every variant and the merged model answer (0: all).
        constrained_items: how many of them are also asked with the answer's schema enforced.
        base_items: how many of them the untouched base answers, for "before" (0: none).
        golden_prompts: prompts in the golden pack; ``golden_max_drop``: share of them that a later release
            may lose. ``golden_candidates``: how many are tried on faulty models to find those that notice most; as many as
            ``golden_prompts``, or fewer: none are tried. ``golden_text_tokens``: length at most of a text of many scripts that a
            device scores token by token, besides: it notices what short answers do not; 0: none.
        bench_repeats: repeats of the speed measurement.
        seed: order of the evaluation set.
        warnings: when early warnings turn amber and red.
    """

    text_tokens: int = Field(default=2048, ge=64)
    task_items: int = Field(default=96, ge=0)
    constrained_items: int = Field(default=20, ge=0)
    base_items: int = Field(default=24, ge=0)
    golden_prompts: int = Field(default=8, ge=1, le=64)
    golden_max_drop: Ratio = Field(default=0.0, ge=0, lt=1)
    golden_candidates: int = Field(default=0, ge=0, le=256)
    golden_text_tokens: int = Field(default=384, ge=0, le=4096)
    bench_repeats: int = Field(default=3, ge=1)
    seed: int = 7
    warnings: WarningLights = WarningLights()

    def fast(self) -> Evaluation:
        """The same questions asked of less: for a quick look and for continuous integration."""
        return self.model_copy(
            update={
                "text_tokens": min(self.text_tokens, 768),
                "task_items": min(self.task_items or 24, 24),
                "constrained_items": min(self.constrained_items, 6),
                "base_items": min(self.base_items, 6),
                "bench_repeats": 1,
                "golden_candidates": min(self.golden_candidates, self.golden_prompts + 4),
            }
        )
