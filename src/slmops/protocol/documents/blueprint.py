"""``kind: Blueprint``: the declared state of a cohort, and how a change reaches it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from slmops.core.device.fit import Serving as FitServing
from slmops.core.device.windows import parse_window
from slmops.core.errors import SlmopsError
from slmops.core.evidence.gates import BinaryGate, ContinuousGate, PairedGate
from slmops.core.rollout.judge import Deadlines, Gate
from slmops.core.rollout.machine import Policy
from slmops.core.rollout.plan import InFlight, WaveSpec
from slmops.core.rollout.selector import parse_selector
from slmops.protocol.documents.quantities import Metadata, Ratio, Section


def _selector(text: str) -> str:
    try:
        parse_selector(text)
    except SlmopsError as error:
        raise ValueError(str(error)) from error
    return text


class ModelReference(Section):
    """Which release: the one a channel points to, or one version."""

    name: str
    channel: str | None = None
    version: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> ModelReference:
        if (self.channel is None) == (self.version is None):
            raise ValueError("give exactly one of channel and version")
        return self


class Serving(Section):
    """How the release is served.

    Attributes:
        context_tokens: of one conversation.
        kv_cache: element type of the KV cache.
        parallel: conversations at once.
        micro_batch_tokens: prompt tokens computed at once; small saves memory, large is faster on long
            prompts.
        system_prompt: name of one of the release's prompts; None for none.
        min_decode_tps: a device that would be slower refuses.
    """

    context_tokens: int = 2048
    kv_cache: str = "q8_0"
    parallel: int = Field(default=2, ge=1, le=64)
    micro_batch_tokens: int = Field(default=64, ge=8, le=4096)
    system_prompt: str | None = None
    min_decode_tps: float | None = None

    @model_validator(mode="after")
    def _known(self) -> Serving:
        try:
            self.for_fit()
        except SlmopsError as error:
            raise ValueError(str(error)) from error
        return self

    def for_fit(self) -> FitServing:
        """The settings that cost memory."""
        return FitServing(self.context_tokens, self.kv_cache, self.parallel, self.micro_batch_tokens)


class ServingOverlay(Section):
    """Settings that a part of the cohort is served with instead; what is not named stays as it is.

    ``system_prompt: null`` takes the prompt away.
    """

    context_tokens: int | None = None
    kv_cache: str | None = None
    parallel: int | None = None
    micro_batch_tokens: int | None = None
    system_prompt: str | None = None
    min_decode_tps: float | None = None


class Overlay(Section):
    """The local adaptation of the devices that a selector matches."""

    selector: str
    serving: ServingOverlay

    @field_validator("selector")
    @classmethod
    def _readable(cls, text: str) -> str:
        return _selector(text)

    def over(self, serving: Serving) -> Serving:
        """These settings with the overlay's own put over them.

        Raises:
            ValueError: the result is not valid.
        """
        return Serving.model_validate(serving.model_dump() | self.serving.model_dump(exclude_unset=True))


class Wave(Section):
    """One wave; ``limit`` is cumulative over the cohort: ``10%`` or a number of devices."""

    selector: str | None = None
    limit: str | int | None = None
    min_devices: int = Field(default=1, ge=1)
    max_failures: int | None = Field(default=None, ge=0)
    dynamic: bool = False

    @field_validator("selector")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        return None if text is None else _selector(text)

    @field_validator("limit")
    @classmethod
    def _limit(cls, limit: str | int | None) -> str | int | None:
        if isinstance(limit, str):
            if not limit.endswith("%"):
                raise ValueError(f"limit {limit!r}: write 10% or a number of devices")
            share = float(limit[:-1])
            if not 0 < share <= 100:
                raise ValueError(f"limit {limit!r} is not between 0% and 100%")
        elif isinstance(limit, int) and limit < 1:
            raise ValueError(f"limit {limit}: a wave needs at least one device")
        return limit

    def spec(self) -> WaveSpec:
        """As the planner wants it."""
        ratio = float(self.limit[:-1]) / 100 if isinstance(self.limit, str) else None
        return WaveSpec(
            selector=parse_selector(self.selector) if self.selector is not None else None,
            limit_ratio=ratio,
            limit_devices=self.limit if isinstance(self.limit, int) else None,
            min_devices=self.min_devices,
            max_failures=self.max_failures,
            dynamic=self.dynamic,
        )


class MaxInFlight(Section):
    """Exposure at once; grows only on evidence."""

    start: int = Field(default=5, ge=1)
    growth: float = Field(default=2.0, ge=1.0)
    max: int = Field(default=500, ge=1)


class Bake(Section):
    """How long a passed wave is held, and how long an inconclusive one is waited for, seconds."""

    min_s: int = Field(default=600, ge=0)
    max_s: int = Field(default=86_400, ge=1)


class DeadlinesSpec(Section):
    """How long silence is only silence, seconds."""

    acknowledge_s: int = Field(default=259_200, ge=1)
    update_s: int = Field(default=21_600, ge=1)


class DisruptionBudget(Section):
    """How many devices of one group may be in flight together."""

    group_by: str
    max_unavailable: int = Field(ge=1)


class Windows(Section):
    """When devices may act, in their own local time: ``minute hour day month weekday +length``, for example ``0 1 * * * +4h``.

    Attributes:
        download: for fetching; a download that a closing window interrupts goes on in the next one.
        activate: for the swap to the new release.
    """

    download: str | None = None
    activate: str | None = None

    @field_validator("download", "activate")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                parse_window(text)
            except SlmopsError as error:
                raise ValueError(str(error)) from error
        return text

    def longest_wait_s(self) -> float:
        """How long a device may have to wait for both of them."""
        return sum(
            parse_window(text).longest_wait().total_seconds()
            for text in (self.download, self.activate)
            if text is not None
        )


class RolloutGate(Section):
    """A gate between waves."""

    metric: str
    kind: Literal["binary", "paired", "continuous"]
    p0: float | None = None
    p1: float | None = None
    alpha: float = 0.05
    max_drop: Ratio | None = None
    direction: Literal["decrease", "increase"] | None = None
    allowed_ratio: float | None = None
    critical_ratio: float | None = None

    @model_validator(mode="after")
    def _valid(self) -> RolloutGate:
        try:
            self.gate()
        except SlmopsError as error:
            raise ValueError(str(error)) from error
        return self

    def gate(self) -> Gate:
        """As the judge wants it."""
        if self.kind == "binary":
            return BinaryGate(
                self.metric,
                self.p0 if self.p0 is not None else 0.02,
                self.p1 if self.p1 is not None else 0.10,
                self.alpha,
            )
        if self.kind == "paired":
            return PairedGate(self.metric, self.max_drop if self.max_drop is not None else 0.0)
        if self.direction is None or self.allowed_ratio is None or self.critical_ratio is None:
            raise ValueError(
                f"gate {self.metric}: continuous needs direction, allowed_ratio and critical_ratio"
            )
        return ContinuousGate(self.metric, self.direction, self.allowed_ratio, self.critical_ratio)


class RolloutSpec(Section):
    """How a change reaches the cohort."""

    waves: tuple[Wave, ...] = Field(
        default=(Wave(limit="10%", max_failures=0), Wave(limit="100%", dynamic=True)), min_length=1
    )
    max_in_flight: MaxInFlight = MaxInFlight()
    bake: Bake = Bake()
    deadlines: DeadlinesSpec = DeadlinesSpec()
    budget: DisruptionBudget | None = None
    holdback_ratio: Ratio = Field(default=0.0, le=0.5)
    windows: Windows = Windows()
    gates: tuple[RolloutGate, ...] = (
        RolloutGate(metric="device.failed", kind="binary"),
        RolloutGate(metric="golden.pass", kind="paired", max_drop=0.0),
    )
    probation_min_s: float = Field(default=60.0, ge=0)
    approvals: int = Field(default=0, ge=0)
    on_abort: Literal["hold", "revert_uncommitted", "revert_all"] = "revert_all"

    def policy(self) -> Policy:
        """As the rollout machine wants it."""
        return Policy(len(self.waves), self.approvals, self.bake.min_s, self.bake.max_s, self.on_abort)

    def in_flight(self) -> InFlight:
        """As the planner wants it."""
        return InFlight(self.max_in_flight.start, self.max_in_flight.growth, self.max_in_flight.max)

    def silence(self) -> Deadlines:
        """As the judge wants it."""
        update_s = (
            self.deadlines.update_s + self.windows.longest_wait_s()
        )  # waiting for a window is not silence
        return Deadlines(self.deadlines.acknowledge_s, int(update_s))


class Blueprint(Section):
    """What a cohort should run, and how it gets there.

    Attributes:
        selector: the cohort. A device that two blueprints select belongs to the one of higher ``priority``; with equal
            ones neither may be applied before that is settled.
        overlays: local adaptations. A device takes all that match it, in the order of the list: later ones win.
    """

    api_version: Literal["slmops/v1"] = Field(alias="apiVersion")
    kind: Literal["Blueprint"]
    metadata: Metadata
    selector: str = ""
    model: ModelReference
    priority: int = Field(default=0, ge=-1000, le=1000)
    serving: Serving = Serving()
    overlays: tuple[Overlay, ...] = Field(default=(), max_length=64)
    telemetry: dict[str, Any] = Field(default_factory=lambda: {"tier": "T1"})
    rollout: RolloutSpec = RolloutSpec()

    @model_validator(mode="after")
    def _overlays_hold(self) -> Blueprint:
        together = self.serving
        for index, overlay in enumerate(self.overlays):
            for below in (self.serving, together):
                try:
                    merged = overlay.over(below)
                except ValueError as error:
                    first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                    raise ValueError(f"overlays[{index}] ({overlay.selector}): {first}") from error
            together = merged
        return self

    @field_validator("selector")
    @classmethod
    def _readable(cls, text: str) -> str:
        return _selector(text)
