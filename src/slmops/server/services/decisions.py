"""What decisions about rollouts are made of: a person's actions, the judge's words, the outbox's commands. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from slmops.core.evidence.gates import Verdict
from slmops.core.rollout.judge import Judgement
from slmops.core.rollout.machine import (
    ENDED,
    AbortOrdered,
    Approved,
    Close,
    Command,
    Event,
    OpenWave,
    PauseOrdered,
    Phase,
    Rejected,
    ResumeOrdered,
    RevertDevices,
    RollbackOrdered,
    Withdraw,
)
from slmops.server.ports.rows import JudgementRow, OutcomeRow
from slmops.server.services.words import Role

#: action -> (role that may, event that it means)
ACTIONS: dict[str, tuple[Role, Callable[[str, str], Event]]] = {
    "approve": (Role.APPROVER, lambda by, reason: Approved(by)),
    "reject": (Role.APPROVER, lambda by, reason: Rejected(by)),
    "pause": (Role.OPERATOR, lambda by, reason: PauseOrdered(said("paused", by, reason))),
    "resume": (Role.OPERATOR, lambda by, reason: ResumeOrdered()),
    "abort": (Role.OPERATOR, lambda by, reason: AbortOrdered(said("aborted", by, reason))),
    "rollback": (Role.OPERATOR, lambda by, reason: RollbackOrdered(said("rolled back", by, reason))),
}

#: phases that a restart, a tick or a person can still move
ALIVE = frozenset(Phase) - ENDED
COMPLETE = frozenset({Phase.COMPLETED, Phase.COMPLETED_PARTIAL})


def sentence(judgement: Judgement) -> str:
    """The finding that decided, in one sentence."""
    for verdict in (Verdict.FAIL, Verdict.ERROR, Verdict.INCONCLUSIVE, Verdict.PASS):
        for finding in judgement.findings:
            if finding.verdict is verdict:
                return f"{finding.gate}: {finding.reason}"
    return ""


def judgement_row(before: JudgementRow | None, judgement: Judgement, now: datetime) -> JudgementRow:
    """A judgement as it is kept; the row before it stays when nothing changed, with its time."""
    findings = tuple((f.gate, f.verdict.value, f.reason, f.needed) for f in judgement.findings)
    if before is not None and (before.verdict, before.findings) == (judgement.verdict.value, findings):
        return before
    return JudgementRow(now, judgement.verdict.value, findings)


def written(command: Command) -> tuple[str, Mapping[str, int | str]]:
    """A command as the outbox keeps it."""
    if isinstance(command, OpenWave):
        return "open_wave", {"wave": command.wave}
    if isinstance(command, Withdraw):
        return "withdraw", {}
    if isinstance(command, RevertDevices):
        return "revert_devices", {"scope": command.scope}
    assert isinstance(command, Close)
    return "close", {"phase": command.phase.value}


def by_device(outcomes: Sequence[OutcomeRow]) -> dict[str, list[OutcomeRow]]:
    """Outcomes by device, in their order."""
    grouped: dict[str, list[OutcomeRow]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.device_id, []).append(outcome)
    return grouped


def said(what: str, by: str, reason: str) -> str:
    """A person's action in words."""
    return f"{what} by {by}: {reason}" if reason else f"{what} by {by}"
