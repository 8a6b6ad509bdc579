"""What the evidence of the open waves says: device counts live here, never in the rollout machine.

A device has *succeeded* when it committed **and** reports the assigned digest as running. A device that
acknowledged and then fell silent past the deadline is presumed failed and counts; one that never acknowledged
is *not reached*: it is outside every ratio, but always shown. Failures are split by cause: ``max_failures``
of a wave counts content failures only, the e-process of a binary gate counts both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum

from slmops.core.evidence.gates import BinaryGate, ContinuousGate, Finding, PairedGate, Verdict, combine
from slmops.core.evidence.statistics import PairedCounts

Gate = BinaryGate | PairedGate | ContinuousGate


class DeviceStatus(str, Enum):
    """Where one device stands in one rollout, as the server knows it."""

    WAITING = "waiting"  # in a wave, no offer made yet
    OFFERED = "offered"  # offer made, not yet acknowledged
    IN_PROGRESS = "in_progress"
    COMMITTED = "committed"
    FAILED = "failed"
    REVERTED = "reverted"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class DeviceEvidence:
    """What the server knows of one device in one rollout.

    Attributes:
        device_id: the device.
        status: as reported.
        running_matches: the reported running digest equals the assigned one.
        cause: ``content`` or ``environment`` for failures, else empty.
        offered_at: when the offer was made; ``acknowledged_at``: when the device first reported working on
            it.
        settled_at: when the outcome was reported.
        golden: paired outcomes of the committed release's golden pack on this device, old against new.
        ratios: metric name to new/old on this device.
    """

    device_id: str
    status: DeviceStatus
    running_matches: bool = False
    cause: str = ""
    detail: str = ""
    offered_at: datetime | None = None
    acknowledged_at: datetime | None = None
    settled_at: datetime | None = None
    golden: PairedCounts | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long silence is only silence."""

    acknowledge_s: int = 259_200
    update_s: int = 21_600


@dataclass(frozen=True, slots=True)
class Counts:
    """Devices of the judged waves by what they came to."""

    waiting: int = 0
    in_flight: int = 0
    committed: int = 0
    failed_content: int = 0
    failed_environment: int = 0
    presumed_failed: int = 0
    not_reached: int = 0

    @property
    def settled(self) -> int:
        """Devices with an outcome that counts."""
        return self.committed + self.failed

    @property
    def failed(self) -> int:
        """Every failure, whatever its cause."""
        return self.failed_content + self.failed_environment + self.presumed_failed


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on the open wave.

    Attributes:
        verdict: worst of the findings.
        findings: one per gate, with reasons.
        counts: of the open wave.
        complete: no device of the wave is still waiting or in flight.
    """

    verdict: Verdict
    findings: tuple[Finding, ...]
    counts: Counts
    complete: bool


def count(evidence: Sequence[DeviceEvidence], deadlines: Deadlines, now: datetime) -> Counts:
    """Sort devices into the classes that ratios are made of."""
    waiting = in_flight = committed = content = environment = presumed = unreached = 0
    for device in evidence:
        if device.status is DeviceStatus.WAITING:
            waiting += 1
        elif device.status is DeviceStatus.COMMITTED and device.running_matches:
            committed += 1
        elif device.status in (DeviceStatus.FAILED, DeviceStatus.REVERTED, DeviceStatus.REFUSED):
            content, environment = (
                (content + 1, environment) if device.cause == "content" else (content, environment + 1)
            )
        elif device.status is DeviceStatus.WITHDRAWN:
            unreached += 1
        elif device.acknowledged_at is None:
            late = device.offered_at is not None and now - device.offered_at > timedelta(
                seconds=deadlines.acknowledge_s
            )
            unreached, in_flight = (unreached + 1, in_flight) if late else (unreached, in_flight + 1)
        else:  # acknowledged and working, or "committed" without running what was assigned
            late = now - device.acknowledged_at > timedelta(seconds=deadlines.update_s)
            presumed, in_flight = (presumed + 1, in_flight) if late else (presumed, in_flight + 1)
    return Counts(waiting, in_flight, committed, content, environment, presumed, unreached)


def judge(  # noqa: PLR0913 - the question has this many independent parts
    gates: Sequence[Gate],
    wave: Sequence[DeviceEvidence],
    everyone: Sequence[DeviceEvidence],
    *,
    max_failures: int | None,
    min_devices: int,
    deadlines: Deadlines,
    now: datetime,
) -> Judgement:
    """Judge the open wave.

    Args:
        gates: the blueprint's gates.
        wave: evidence of the open wave, for ``max_failures`` and ``min_devices``.
        everyone: evidence of this and all earlier waves, for the gates' statistics.
        max_failures: content failures that the wave tolerates; None for no limit.
        min_devices: fewest settled devices of the wave for a pass.
        deadlines: silence limits.
        now: UTC.
    """
    counts = count(wave, deadlines, now)
    overall = count(everyone, deadlines, now)
    # A wave smaller than min_devices (a small fleet, or devices never reached) must still be able to finish.
    needed = min(min_devices, max(len(wave) - counts.not_reached, 0))
    findings = [_committed_at_all(counts, overall, needed)]
    if max_failures is not None:
        text = f"{counts.failed_content} content failures in this wave, {max_failures} tolerated"
        verdict = Verdict.FAIL if counts.failed_content > max_failures else Verdict.PASS
        findings.append(Finding("max_failures", verdict, text + _first_failure(wave)))
    for gate in gates:
        findings.append(_ask(gate, wave, everyone, overall, needed))
    complete = counts.waiting == 0 and counts.in_flight == 0
    return Judgement(combine(findings), tuple(findings), counts, complete)


def _committed_at_all(counts: Counts, overall: Counts, needed: int) -> Finding:
    """Silence and failures never promote: a wave passes only on devices that run the release.

    An empty wave (nobody left to place, or a selector that nobody matches) passes on the devices of earlier
    waves, and is inconclusive where there are none.
    """
    size = counts.waiting + counts.in_flight + counts.settled + counts.not_reached
    text = f"{counts.committed} of {size} devices run the release"
    if counts.not_reached:
        text += f", {counts.not_reached} not reached"
    if size == 0:
        verdict = Verdict.PASS if overall.committed else Verdict.INCONCLUSIVE
        return Finding("wave.reached", verdict, "the wave has no devices", 0 if overall.committed else 1)
    if counts.settled < needed or counts.committed == 0:
        return Finding("wave.reached", Verdict.INCONCLUSIVE, text, max(needed - counts.settled, 1))
    return Finding("wave.reached", Verdict.PASS, text)


def _first_failure(wave: Sequence[DeviceEvidence]) -> str:
    for device in wave:
        if device.cause == "content" and device.status is not DeviceStatus.COMMITTED:
            return (
                f": {device.device_id} {device.status.value}, {device.detail}"
                if device.detail
                else f": {device.device_id}"
            )
    return ""


def _ask(
    gate: Gate,
    wave: Sequence[DeviceEvidence],
    everyone: Sequence[DeviceEvidence],
    overall: Counts,
    needed: int,
) -> Finding:
    try:
        if isinstance(gate, BinaryGate):
            return gate.judge(overall.failed, overall.settled, min_devices=needed)
        if isinstance(gate, ContinuousGate):
            ratios = [d.ratios[gate.metric] for d in everyone if gate.metric in d.ratios]
            return gate.judge(ratios, min_devices=needed)
        return _ask_paired(gate, wave or everyone)
    except (ArithmeticError, ValueError, KeyError) as error:
        return Finding(gate.metric, Verdict.ERROR, f"the gate could not be computed: {error!r}")


def _ask_paired(gate: PairedGate, wave: Sequence[DeviceEvidence]) -> Finding:
    """Golden packs are conformance tests, not samples: each device answers for itself with its point drop."""
    measured = [d for d in wave if d.golden is not None and d.golden.n > 0]
    worse = [d for d in measured if d.golden is not None and d.golden.drop > gate.max_drop]
    if worse:
        first = worse[0]
        drop = first.golden.drop if first.golden else 0.0
        return Finding(
            gate.metric,
            Verdict.FAIL,
            f"{len(worse)} devices lost more than {gate.max_drop:g}, {first.device_id} lost {drop:.2f}",
        )
    committed = [d for d in wave if d.status is DeviceStatus.COMMITTED]
    missing = [d for d in committed if d.golden is None]
    if missing:
        return Finding(
            gate.metric,
            Verdict.INCONCLUSIVE,
            f"{len(missing)} committed devices reported no golden result",
            len(missing),
        )
    if not measured:
        return Finding(gate.metric, Verdict.INCONCLUSIVE, "no device has reported a golden result yet", 1)
    return Finding(
        gate.metric,
        Verdict.PASS,
        f"{len(measured)} of {len(committed)} devices of this wave kept their golden answers (at most {gate.max_drop:g} lost)",
    )
