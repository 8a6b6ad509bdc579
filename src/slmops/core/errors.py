"""Every error that slmops raises on purpose, and what a caller may do about it.

::

    SlmopsError                     code, message (expected and got), hint (the fix), fields
    ├── UsageError          exit 2  the input is at fault; retrying the same call cannot help
    │   ├── DocumentError           a YAML or JSON document, with file, line and column
    │   ├── NotFoundError           http 404
    │   ├── ConflictError           stale generation, name taken (http 409)
    │   ├── IllegalTransitionError  a step that a state machine's table does not have (http 409)
    │   ├── BaseModelError          truncated, not a GGUF, wrong architecture
    │   ├── BudgetError             no quantisation meets the budget; names the tensors that bound it
    │   ├── LeakageError            evaluation items were trained or calibrated on; names the lines
    │   └── VersionMismatchError    the other side speaks another protocol version
    ├── AuthError           exit 4  who is asking (http 401 or 403)
    │   ├── TokenError              expired, reused or unknown token
    │   └── PermissionDeniedError   known, but the role does not allow it
    ├── TrustError          exit 3  never retried, never downgraded
    │   ├── DigestError             bytes do not hash to the name they were asked by
    │   ├── SignatureError          signature missing, wrong, or below the threshold
    │   ├── ExpiredMetadataError    signed metadata is past its date
    │   └── DowngradeError          release_seq went backwards without a grant
    ├── TransientError      exit 75 retry with backoff
    │   ├── NetworkError
    │   ├── DeadlineError
    │   └── BusyError               port, lock or server is taken; may carry retry_after_s
    ├── DeviceError         exit 1  the device could not do it
    │   ├── NoSpaceError            environment
    │   ├── NoMemoryError           environment
    │   ├── RuntimeLoadError        content: the engine refused the file
    │   └── HealthCheckError        content: loaded, but does not behave
    ├── BuildError          exit 1  a build step failed
    ├── GateError           exit 5  a gate did not pass
    └── BugError            exit 1  an invariant of ours does not hold

A failed gate inside a rollout, "nothing to do" and a refused offer are values, not exceptions.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Retry = Literal["never", "backoff"]
Scalar = str | int | float | bool | None

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_TRUST = 3
EXIT_AUTH = 4
EXIT_GATE = 5
EXIT_TRANSIENT = 75


class SlmopsError(Exception):
    """Root of the tree: a stable code, a message with both values, and the fix.

    Args:
        message: what happened, with the expected and the actual value.
        hint: the next command or edit that mends it; empty only when there is none.
        fields: machine-readable facts (sizes in bytes, paths, digests) for ``--json`` and problem documents.
    """

    code: ClassVar[str] = "slmops.error"
    exit_code: ClassVar[int] = EXIT_BUG
    http_status: ClassVar[int] = 500
    retry: ClassVar[Retry] = "never"

    def __init__(self, message: str, *, hint: str = "", **fields: Scalar) -> None:
        """Keep message, hint and fields apart so that every surface can show them in its own form."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields: dict[str, Scalar] = dict(fields)

    def __str__(self) -> str:
        """Message, then the fix."""
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class UsageError(SlmopsError):
    """The input is at fault."""

    code = "usage"
    exit_code = EXIT_USAGE
    http_status = 400


class DocumentError(UsageError):
    """A document does not say what its schema expects; the message starts with file:line:column."""

    code = "usage.document"
    http_status = 422


class NotFoundError(UsageError):
    """The named thing does not exist."""

    code = "usage.not_found"
    http_status = 404


class ConflictError(UsageError):
    """The thing changed meanwhile, or the name is taken."""

    code = "usage.conflict"
    http_status = 409


class IllegalTransitionError(UsageError):
    """A state machine's table has no such step."""

    code = "usage.illegal_transition"
    http_status = 409


class BaseModelError(UsageError):
    """The base model's file is truncated, not a GGUF, or of an architecture that we cannot read."""

    code = "usage.base_model"


class BudgetError(UsageError):
    """No choice of tensor types meets the byte or memory budget."""

    code = "usage.budget"


class LeakageError(UsageError):
    """Evaluation items occur in the training or calibration lines."""

    code = "usage.leakage"
    http_status = 422


class VersionMismatchError(UsageError):
    """The peer speaks a protocol version that we do not."""

    code = "usage.version_mismatch"
    http_status = 426


class AuthError(SlmopsError):
    """Who is asking could not be established."""

    code = "auth"
    exit_code = EXIT_AUTH
    http_status = 401


class TokenError(AuthError):
    """The token is expired, used up or unknown."""

    code = "auth.token"


class PermissionDeniedError(AuthError):
    """Known caller, but its role does not allow this."""

    code = "auth.permission"
    http_status = 403


class TrustError(SlmopsError):
    """Bytes or signatures do not prove what they claim; never retried, never downgraded."""

    code = "trust"
    exit_code = EXIT_TRUST
    http_status = 422


class DigestError(TrustError):
    """Bytes do not hash to the digest by which they were asked for."""

    code = "trust.digest"


class SignatureError(TrustError):
    """A signature is missing, wrong, or below its role's threshold."""

    code = "trust.signature"


class ExpiredMetadataError(TrustError):
    """Signed metadata is past its expiry date."""

    code = "trust.expired"


class DowngradeError(TrustError):
    """A release with a lower ``release_seq`` was offered without a signed grant."""

    code = "trust.downgrade"


class TransientError(SlmopsError):
    """Worth another try, with backoff."""

    code = "transient"
    exit_code = EXIT_TRANSIENT
    http_status = 503
    retry = "backoff"


class NetworkError(TransientError):
    """The peer could not be reached or broke off."""

    code = "transient.network"
    http_status = 502


class DeadlineError(TransientError):
    """The work did not finish in its time."""

    code = "transient.deadline"
    http_status = 504


class BusyError(TransientError):
    """A port, a lock or a server is taken."""

    code = "transient.busy"


class DeviceError(SlmopsError):
    """The device could not do what it was asked to."""

    code = "device"


class NoSpaceError(DeviceError):
    """Not enough disk for the bytes that are about to be written."""

    code = "device.no_space"
    http_status = 507


class NoMemoryError(DeviceError):
    """Not enough memory for weights, KV cache and buffers."""

    code = "device.no_memory"


class RuntimeLoadError(DeviceError):
    """The engine refused the model file or died while loading it."""

    code = "device.runtime_load"


class HealthCheckError(DeviceError):
    """The engine loaded the model but does not answer as it must."""

    code = "device.health_check"


class BuildError(SlmopsError):
    """A build step failed; nothing of it is cached."""

    code = "build"


class GateError(SlmopsError):
    """A gate did not pass and was not waived."""

    code = "gate"
    exit_code = EXIT_GATE
    http_status = 409


class BugError(SlmopsError):
    """An invariant of ours does not hold: please report it."""

    code = "bug"
