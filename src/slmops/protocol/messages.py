"""What agent and control plane say to each other: closed schemas of numbers, enums, digests and fixed words.

Nothing here can carry a prompt or an answer. Unknown fields are ignored on both sides, so either may be
newer; a message whose ``schema`` is above ours is refused with ``usage.version_mismatch``. Golden vectors:
tests/golden.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from slmops.artifact.digest import UNREADABLE_JSON
from slmops.core.errors import UsageError, VersionMismatchError

SCHEMA = 1
MAX_MESSAGE_BYTES = 256 << 10
# Checked by msgspec when a message is read ("\Z", because "$" lets a trailing line break through).
Schema = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
#: longer than any window that a person writes
WindowText = Annotated[str, msgspec.Meta(max_length=200)]
PerSecond = Annotated[float, msgspec.Meta(ge=0)]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
DigestOrNone = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{64})?\Z")]

#: header with the speaker's protocol version, on every request and response
PROTOCOL_HEADER = "X-Slmops-Protocol"
#: header with the control plane's clock, RFC 3339 UTC: devices learn their offset from it
TIME_HEADER = "X-Slmops-Time"
#: audience of a device's JWT
DEVICE_AUDIENCE = "slmops-control-plane"
#: longest life of a device's JWT, seconds
DEVICE_TOKEN_S = 120


class Bench(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a device measured of itself with its own engine (``slmops agent bench``).

    Attributes:
        artifact_sha256: file that was measured; ``weights_bytes`` and ``parameters`` are its shape.
        prefill_tps: prompt tokens per second; ``decode_tps``: answer tokens per second.
        ttft_s: time to first token, seconds; ``load_s``: from start to ready.
        rss_bytes: peak resident memory of the engine.
        measured_at: UTC, RFC 3339.
        runtime: engine that it was measured with; empty from agents that knew only llama.cpp.
    """

    artifact_sha256: Digest
    weights_bytes: Count
    parameters: Count
    prefill_tps: PerSecond
    decode_tps: PerSecond
    ttft_s: Seconds
    load_s: Seconds
    rss_bytes: Count
    measured_at: str
    runtime: str = ""

    def speaks_of(self, runtime: str) -> bool:
        """Whether it tells how fast an engine of this runtime is here: another one reads memory at another rate."""
        return (self.runtime or "llama.cpp") == runtime


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a device has, sent at enrolment and whenever it changes."""

    arch: str
    cores: Count
    ram_limit_bytes: Count
    disk_free_bytes: Count
    runtimes: dict[str, str]
    agent_version: str
    limits: dict[str, str] = {}
    bench: Bench | None = None


class EnrollRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A new device introduces itself.

    Attributes:
        token: one-time (or counted) enrolment token.
        public_key_pem: P-256 public key whose private half never leaves the device.
        name: wished name; the server appends digits when it is taken.
        profile: the device profile.
        labels: for selectors; ``profile`` and ``site`` are usual.
    """

    schema: Schema
    token: str
    public_key_pem: str
    name: str
    profile: str
    facts: Facts
    labels: dict[str, str] = {}


class EnrollResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a device is told once and pins.

    Attributes:
        device_id: its name from now on.
        tuf_root: root metadata (JSON text) that the device pins.
        poll_s: how often to check in.
    """

    schema: Schema
    device_id: str
    tuf_root: str
    poll_s: Seconds


class GoldenReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """Golden-pack outcome in numbers: prompts are named by id, never quoted.

    Attributes:
        own_passed: prompts of the candidate's own pack that passed; ``own_failed`` those that did not.
        both, only_old, only_new, neither: paired outcomes of the committed release's pack.
        lost: ids that the old model kept and the new one lost.
        by_answers: the engine gives no log-probabilities: it was judged by its answers at temperature 0, which notices less.
    """

    own_passed: Count
    own_failed: Count
    both: Count = 0
    only_old: Count = 0
    only_new: Count = 0
    neither: Count = 0
    lost: tuple[str, ...] = ()
    by_answers: bool = False


class OutcomeReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the last offer ended on the device; repeated until the server has taken it.

    Attributes:
        cause: content | environment | operator; empty on success.
        code: stable error code; ``detail``: numbers in words.
        ratios: metric name to new/old, where the device measured both.
        fetched_bytes: bytes that this update moved over the network.
        failed_requests: client requests that failed during the update.
    """

    assignment_digest: Digest
    rollout_id: str
    generation: Count
    status: Literal["committed", "reverted", "refused", "failed", "withdrawn", "fallback"]
    cause: str = ""
    code: str = ""
    detail: str = ""
    golden: GoldenReport | None = None
    ratios: dict[str, float] = {}
    fetched_bytes: Count = 0
    failed_requests: Count = 0


class CheckinRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A device says where it stands.

    Attributes:
        boot_id: chosen at every start of the agent.
        seq: grows with every check-in of this device for ever; a lower one is a replay.
        generation: highest generation that the device acted upon.
        phase: of the device machine.
        running: assignment digest that it serves; empty when it serves nothing.
        running_release: release digest behind it; ``candidate``: assignment digest it is moving to.
        fetched_bytes: bytes fetched over the network since enrolment.
        requests: client requests answered since the start; ``failed_requests``: that ended in a 5xx.
        facts: only when they changed since the last accepted check-in.
        outcome: until acknowledged (a response with the same or a higher generation).
        stale_since: RFC 3339 time from which signed metadata is expired ("freshness unknown since"); empty
            when fresh.
    """

    schema: Schema
    boot_id: str
    seq: Count
    generation: Count
    phase: str
    running: DigestOrNone = ""
    running_release: DigestOrNone = ""
    candidate: DigestOrNone = ""
    fetched_bytes: Count = 0
    requests: Count = 0
    failed_requests: Count = 0
    facts: Facts | None = None
    outcome: OutcomeReport | None = None
    stale_since: str = ""


class ServingSettings(msgspec.Struct, frozen=True):
    """How a release is served; all of it is part of the assignment's identity, so nothing has a default here.

    Attributes:
        context_tokens: of one conversation.
        kv_cache: element type of the KV cache.
        parallel: conversations at once.
        micro_batch_tokens: prompt tokens computed at once.
        system_prompt: name of the release's prompt that chats without a system message get; empty for none.
    """

    context_tokens: Count
    kv_cache: str
    parallel: Count
    micro_batch_tokens: Count
    system_prompt: str


class NamedDigest(msgspec.Struct, frozen=True):
    """A small file of a release by name."""

    name: str
    sha256: Digest
    bytes: Count


class Assignment(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a device should do now.

    Attributes:
        generation: grows with every change for this device; an older one is ignored.
        action: ``run`` the named release, ``withdraw`` it if it is not active yet, ``revert`` to the previous
            one.
        assignment_digest: the device computes it again from the verified documents and refuses a difference.
        target_path: TUF target of the release manifest.
        min_decode_tps: slowest acceptable decode; None for no floor.
        probation_min_s: how long the candidate must serve in probation after its golden packs passed.
        download_window, activate_window: when the device may do so, in its local time (``core.device.windows``); empty
            for always.
    """

    schema: Schema
    generation: Count
    action: Literal["run", "withdraw", "revert"]
    assignment_digest: DigestOrNone
    rollout_id: str = ""
    model: str = ""
    version: str = ""
    release_sha256: DigestOrNone = ""
    release_seq: Count = 0
    target_path: str = ""
    variant_sha256: DigestOrNone = ""
    prompts: tuple[NamedDigest, ...] = ()
    adapters: tuple[NamedDigest, ...] = ()
    serving: ServingSettings | None = None
    min_decode_tps: PerSecond | None = None
    probation_min_s: Seconds = 0.0
    download_window: WindowText = ""
    activate_window: WindowText = ""


class CheckinResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """Body of a 200; an unchanged device gets 204 and no body.

    Attributes:
        poll_s: when to come back (the Retry-After header says the same, rounded up).
        accepted_seq: the request's seq, once it has been written to disk.
        assignment: None when only the acknowledgement changed.
    """

    schema: Schema
    accepted_seq: Count
    poll_s: Seconds
    assignment: Assignment | None = None


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error body (RFC 9457), with our stable code and the fix."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str = ""
    fields: dict[str, str | int | float | bool | None] = {}


Message = TypeVar(
    "Message", EnrollRequest, EnrollResponse, CheckinRequest, CheckinResponse, Assignment, Problem
)

_ENCODER = msgspec.json.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """JSON bytes of a message."""
    return _ENCODER.encode(message)


def decode(content: bytes, kind: type[Message]) -> Message:
    """Read a message.

    Raises:
        UsageError: too large, malformed, or a value outside its closed set; says where.
        VersionMismatchError: its schema is above ours.
    """
    if len(content) > MAX_MESSAGE_BYTES:
        raise UsageError(
            f"{kind.__name__} has {len(content)} bytes, {MAX_MESSAGE_BYTES} are allowed",
            hint="send fewer labels or facts",
        )
    try:
        message = msgspec.json.decode(content, type=kind)
    except UNREADABLE_JSON as error:
        raise UsageError(
            f"{kind.__name__} is malformed: {error}", hint="compare it with docs/reference/protocol.md"
        ) from error
    schema = getattr(message, "schema", SCHEMA)
    if schema > SCHEMA:
        raise VersionMismatchError(
            f"{kind.__name__} has schema {schema}, {SCHEMA} is understood here",
            hint="update the older side of the two",
        )
    return message
