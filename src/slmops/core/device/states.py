"""What the device machine speaks of: phases, its state (the journal), the events that it hears, the commands that it gives.

What they mean to each other is in :mod:`slmops.core.device.machine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

Cause = Literal["content", "environment", "operator"]
SlotName = Literal["a", "b"]


class Phase(str, Enum):
    """Where the device is."""

    IDLE = "idle"
    ADMISSION = "admission"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    STAGED = "staged"
    ACTIVATING = "activating"
    PROBATION = "probation"
    COMMITTED = "committed"
    REVERTING = "reverting"
    REVERTED = "reverted"
    SAFE_FALLBACK = "safe_fallback"


RESTING = frozenset({Phase.IDLE, Phase.COMMITTED, Phase.REVERTED, Phase.SAFE_FALLBACK})
#: phases in which nothing that serves has been touched: a withdrawal simply forgets the candidate
BEFORE_ACTIVATION = frozenset({Phase.ADMISSION, Phase.DOWNLOADING, Phase.VERIFYING, Phase.STAGED})
IN_TRIAL = frozenset({Phase.ACTIVATING, Phase.PROBATION})


@dataclass(frozen=True, slots=True)
class Target:
    """What a device runs or should run, by name.

    Attributes:
        assignment_digest: digest of release, variant, adapters, prompts, serving settings and golden
            expectations.
        release_digest: the release's identity.
        release_seq: signed order of releases.
        rollout_id: the rollout that offered it; empty when an operator imported it.
        generation: the server's generation for this device when it was offered.
    """

    assignment_digest: str
    release_digest: str
    release_seq: int
    rollout_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the last candidate did not make it."""

    cause: Cause
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the last offer ended; reported until the server has acknowledged it."""

    assignment_digest: str
    rollout_id: str
    generation: int
    status: Literal["committed", "reverted", "refused", "failed", "withdrawn", "fallback"]
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Everything that the machine knows; this, as JSON, is the journal.

    Attributes:
        phase: where the device is.
        generation: highest server generation that was acted upon.
        committed: what the device has proved and serves; ``committed_slot`` is where it lies.
        previous: what it ran before, kept in the other slot for an offline revert.
        candidate: what it is moving to; ``candidate_slot`` is where that goes.
        resting: the phase to fall back to when a candidate is dropped before activation.
        probation_starts: times the candidate was started in probation.
        steps: accepted transitions of this update, for :data:`MAX_STEPS`.
        quarantine: assignment digests that failed by content here.
        highest_release_seq: the largest ``release_seq`` committed, against downgrades.
        failure: why the device is reverting.
        outcome: how the last offer ended.
        leaving_proved: the device is reverting by an order, away from a release that it had proved: when what it goes
            back to does not come up, that one stays.
    """

    phase: Phase = Phase.IDLE
    generation: int = 0
    committed: Target | None = None
    committed_slot: SlotName | None = None
    previous: Target | None = None
    candidate: Target | None = None
    resting: Phase = Phase.IDLE
    probation_starts: int = 0
    steps: int = 0
    quarantine: tuple[str, ...] = ()
    highest_release_seq: int = 0
    failure: Failure | None = None
    outcome: Outcome | None = None
    leaving_proved: bool = False

    @property
    def candidate_slot(self) -> SlotName:
        """The slot that the committed release does not occupy."""
        return "b" if self.committed_slot == "a" else "a"


# ---- events ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offered:
    """The server assigned something; ``downgrade_granted`` when a signed grant allows a lower release_seq."""

    target: Target
    downgrade_granted: bool = False


@dataclass(frozen=True, slots=True)
class Admitted:
    """The candidate fits."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The candidate does not fit; the reasons carry the numbers."""

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fetched:
    """All bytes of the candidate are on disk."""


@dataclass(frozen=True, slots=True)
class Verified:
    """All files of the candidate were re-hashed."""


@dataclass(frozen=True, slots=True)
class WindowOpened:
    """The activation window is open and consent is given."""


@dataclass(frozen=True, slots=True)
class Activated:
    """The candidate's engine is up and the pointer names its slot."""


@dataclass(frozen=True, slots=True)
class Proved:
    """Probation passed."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The current work failed for good (the shell has used up its retries)."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Restored:
    """The revert is done: the pointer names the target slot and its engine serves."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The server stopped offering this candidate."""

    assignment_digest: str
    generation: int


@dataclass(frozen=True, slots=True)
class RevertOrdered:
    """The server or an operator at the device wants the previous release back.

    Attributes:
        assignment_digest: what must be running for the order to apply; empty for "whatever runs".
        generation: the server's generation; 0 for an order given at the device.
    """

    assignment_digest: str = ""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Unserved:
    """What was committed cannot be served: its files here are damaged, or its engine does not start."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was committed is whole and serves again."""


@dataclass(frozen=True, slots=True)
class Booted:
    """The agent started; ``pointer`` is the slot that the pointer file names."""

    pointer: SlotName | None


Event = (
    Offered
    | Admitted
    | Refused
    | Fetched
    | Verified
    | WindowOpened
    | Activated
    | Proved
    | Failed
    | Restored
    | Withdrawn
    | RevertOrdered
    | Unserved
    | Repaired
    | Booted
)


# ---- commands --------------------------------------------------------------------------------------------


class Command(str, Enum):
    """What the shell must do next. All are safe to repeat."""

    SERVE_COMMITTED = "serve_committed"
    CHECK_ADMISSION = "check_admission"
    FETCH = "fetch"
    VERIFY = "verify"
    AWAIT_WINDOW = "await_window"
    ACTIVATE = "activate"
    RUN_PROBATION = "run_probation"
    FINISH_COMMIT = (
        "finish_commit"  # route all traffic to the committed slot, stop the old engine, collect garbage
    )
    REVERT = "revert"  # pointer and engine back to the committed slot
    SERVE_FALLBACK = (
        "serve_fallback"  # the previous release where it is whole; else answer "no model" rather than garbage
    )
    REPAIR = "repair"  # fetch what is damaged of the committed release again, and serve it
    DISCARD_CANDIDATE = "discard_candidate"
    REPORT = "report"


Commands = tuple[Command, ...]
Step = tuple[DeviceState, Commands]
