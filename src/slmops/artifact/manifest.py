"""The documents inside a release, and the two identities that everything else hangs on.

* A **release** is the SHA-256 of its canonical manifest bytes (RFC 8785).
* An **assignment** is the digest of {release, variant, adapters, prompts, serving settings, golden
  expectations}: what "the device runs what it was assigned" compares.

The chain: TUF targets -> release manifest -> variant manifest -> chunk map -> chunks. Every arrow is a
SHA-256. Unknown fields are ignored when read; a document with a higher ``schema`` is refused. Golden vectors:
tests/golden.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from slmops.artifact.digest import UNREADABLE_JSON, canonical_json, digest_of, is_digest, sha256_hex
from slmops.core.device.fit import ModelShape
from slmops.core.errors import TrustError

SCHEMA = 1
MAX_DOCUMENT_BYTES = 16 << 20
#: most files that a variant may have
MAX_FILES = 256
#: what a file of a variant may be
FILE_ROLES = frozenset({"model", "part"})

# Checked by msgspec when a document is read, so that nothing further down can meet a name that leads out of
# its folder, a digest that is none, or a negative size. "\Z", because "$" lets a trailing line break through.
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]
#: name of a model, profile, prompt, adapter or file: may hold folders, never leads out of where it is put
Name = Annotated[
    str,
    msgspec.Meta(pattern=r"\A(?![/~])(?!(?:.*/)?\.{1,2}(?:/|\Z))[^\x00-\x1f\x7f\\]+\Z", max_length=200),
]
#: part of a TUF target path
PathPart = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._+-]*\Z", max_length=100)]


class Blob(msgspec.Struct, frozen=True, omit_defaults=True):
    """A small file that is stored and fetched as one chunk."""

    bytes: Size
    sha256: Digest


class NamedBlob(msgspec.Struct, frozen=True, omit_defaults=True):
    """A small file with the name by which a blueprint refers to it (a system prompt, say)."""

    name: Name
    bytes: Size
    sha256: Digest


class ArtifactEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file of a variant.

    Attributes:
        role: ``model`` for the file that the engine opens, ``part`` for every other one.
        path: its place in the variant's own folder, where a part is looked for beside the model; a lone GGUF's is for
            people only.
        format: ``gguf``, ``onnx``, ``litertlm``, ``tflite``, ``pte``, ``json``, ...: says how it is cut.
        bytes: size of the file; ``sha256``: its digest.
        chunk_map: the artifact that says how this one is cut.
    """

    role: str
    path: Name
    format: str
    bytes: Size
    sha256: Digest
    chunk_map: Blob


class RuntimeNeed(msgspec.Struct, frozen=True, omit_defaults=True):
    """The engine that a variant was proved with."""

    name: str
    version: str


class Measured(msgspec.Struct, frozen=True, omit_defaults=True):
    """Figures of the shipped file, measured on the build machine unless marked.

    Ratios are 0..1; ``decode_tps`` and ``prefill_tps`` in tokens per second; ``kld_mean`` in nats per token.
    """

    bits_per_weight: float
    kld_mean: float
    same_top_ratio: Ratio
    perplexity: float
    decode_tps: float
    prefill_tps: float
    load_s: float
    rss_bytes: Size
    exact_match_ratio: Ratio | None = None
    schema_valid_ratio: Ratio | None = None
    schema_valid_constrained_ratio: Ratio | None = None


class Variant(msgspec.Struct, frozen=True, omit_defaults=True):
    """The model built for one profile.

    Attributes:
        profile: the device profile that it was built for; ``also_for``: other profiles that may take it if it
            fits.
        shape: what decides memory and speed on a device.
        golden: this variant's expectations for the release's golden pack.
        quantised: tensor type to number of tensors, as shipped.
        predicted_decode_tps: on the profile, from its bandwidth; None when it was measured on such a device.
    """

    schema: int
    model: PathPart
    profile: PathPart
    runtime: RuntimeNeed
    artifacts: tuple[ArtifactEntry, ...]
    shape: dict[str, Count]
    golden: Blob
    measured: Measured
    quantised: dict[str, Count]
    also_for: tuple[str, ...] = ()
    predicted_decode_tps: float | None = None

    def model_file(self) -> ArtifactEntry:
        """The file that the engine loads.

        Raises:
            TrustError: there is none.
        """
        for entry in self.artifacts:
            if entry.role == "model":
                return entry
        raise TrustError("variant manifest names no file with role 'model'", hint="build the release again")

    @property
    def artifact_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.artifacts)

    @property
    def in_folder(self) -> bool:
        """Whether the engine wants the files under their names in one folder (ADR 0015); a lone GGUF is opened by its digest."""
        return len(self.artifacts) > 1 or self.model_file().format != "gguf"

    def check_files(self) -> None:
        """See that the files can lie in one folder.

        Raises:
            TrustError: no single model file, an unknown role, too many files, or two that want the same place.
        """
        fix = "build the release again"
        roles = sorted({entry.role for entry in self.artifacts} - FILE_ROLES)
        if roles:
            raise TrustError(
                f"variant manifest has a file of role {roles[0]!r}", hint="update slmops on this device"
            )
        if sum(entry.role == "model" for entry in self.artifacts) != 1:
            raise TrustError("variant manifest must name exactly one file with role 'model'", hint=fix)
        if len(self.artifacts) > MAX_FILES:
            raise TrustError(
                f"variant manifest names {len(self.artifacts)} files, {MAX_FILES} are allowed", hint=fix
            )
        # Case does not tell names apart: the folder may lie on a file system that does not either.
        paths = sorted(entry.path.casefold() for entry in self.artifacts)
        for path in paths:
            below = [other for other in paths if other.startswith(f"{path}/")]
            if paths.count(path) > 1 or below:
                raise TrustError(f"two files of the variant want the place {path!r}", hint=fix)

    def model_shape(self) -> ModelShape:
        """The shape as the fit wants it.

        Raises:
            TrustError: a part of it is missing.
        """
        try:
            return ModelShape(**{name: self.shape[name] for name in ModelShape.__dataclass_fields__})
        except KeyError as error:
            raise TrustError(
                f"variant manifest has no shape.{error.args[0]}", hint="build the release again"
            ) from error


class VariantEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A variant inside the release manifest, with what a server needs to choose without opening it."""

    profile: PathPart
    runtime: str
    bytes: Size
    sha256: Digest
    artifact_bytes: Size


class Waiver(msgspec.Struct, frozen=True, omit_defaults=True):
    """A gate that did not pass and was let through by a person, with the reason; signed, shown everywhere."""

    gate: str
    reason: str


class Base(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the model was built from."""

    name: str
    sha256: Digest
    licence: str


class Release(msgspec.Struct, frozen=True, omit_defaults=True):
    """The signed statement: model and version stand for these variants, with this evidence.

    Attributes:
        release_seq: integer that orders releases of a model; the version string is only a label.
        created: UTC, RFC 3339.
        variants: one per profile and runtime.
        golden_pack: prompts, once per release.
        golden_weakened: words on how this pack asks less than the one before; empty when it does not.
        evidence: the build's evidence document.
        provenance: the build's provenance document.
        prompts: system prompts that blueprints may name.
        adapters: digests of adapter releases that may be overlaid.
        waivers: gates let through by a person.
    """

    schema: int
    model: PathPart
    version: PathPart
    release_seq: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
    created: str
    base: Base
    licence: str
    variants: tuple[VariantEntry, ...]
    golden_pack: Blob
    evidence: Blob
    provenance: Blob
    prompts: tuple[NamedBlob, ...] = ()
    adapters: tuple[NamedBlob, ...] = ()
    waivers: tuple[Waiver, ...] = ()
    golden_weakened: str = ""

    def target_path(self) -> str:
        """The TUF target path of this release."""
        return release_target_path(self.model, self.version)


def release_target_path(model: str, version: str) -> str:
    """TUF target path of a release."""
    return f"releases/{model}/{version}.json"


class GoldenMessage(msgspec.Struct, frozen=True):
    """One chat message of a golden prompt."""

    role: str
    content: str


class GoldenPrompt(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prompt and the answer that it must find likely.

    Both are text: a variant with a trimmed vocabulary has other token ids, and the device must exercise its
    own tokenizer and chat template.
    """

    id: str
    messages: tuple[GoldenMessage, ...]
    answer: str


class GoldenPack(msgspec.Struct, frozen=True, omit_defaults=True):
    """The prompts of a release.

    Attributes:
        max_drop_ratio: share of prompts, 0..1, that a later release may lose against this one on the same
            device.
    """

    schema: int
    prompts: tuple[GoldenPrompt, ...]
    max_drop_ratio: Ratio = 0.0


class GoldenTrace(msgspec.Struct, frozen=True, omit_defaults=True):
    """Token by token, what a variant's file said of an answer when it was built. Devices that know no traces ignore them.

    Attributes:
        kv_cache: the KV-cache type that it was scored with.
        logprobs: base64, one byte a token: 16 times the negative log-probability in nats, rounded, 255 at most.
        tolerance: largest acceptable mean absolute difference, nats a token, under that KV-cache type, and between any two
            of f32, f16, bf16 and q8_0; ``tolerance_other_kv``: under another one.
    """

    kv_cache: str
    logprobs: str
    tolerance: Annotated[float, msgspec.Meta(ge=0)]
    tolerance_other_kv: Annotated[float, msgspec.Meta(ge=0)]


class GoldenExpectation(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one prompt must show on a device.

    Attributes:
        id: of the prompt.
        tokens_sha256: digest of the rendered prompt's and answer's token ids (decimal, comma-separated):
            catches a wrong template or tokenizer before any arithmetic.
        reference_logprob: mean log-probability per answer token under the **unquantised** reference, nats.
        tolerance: largest acceptable distance from it for this variant, nats, from its own measured loss.
        floor: lowest mean log-probability at which a *later* release still keeps this answer, nats; -1000: it need not.
        trace: what this file said of each answer token when it was built; of long texts.
    """

    id: str
    tokens_sha256: Digest
    reference_logprob: float
    tolerance: Annotated[float, msgspec.Meta(ge=0)]
    floor: float
    trace: GoldenTrace | None = None


class GoldenExpectations(msgspec.Struct, frozen=True, omit_defaults=True):
    """Expectations of one (variant, overlay) for a golden pack.

    Attributes:
        pack_sha256: the pack that these belong to.
        reference_sha256: the unquantised model file that they were computed from.
    """

    schema: int
    pack_sha256: Digest
    reference_sha256: Digest
    expectations: tuple[GoldenExpectation, ...]


Document = TypeVar("Document", Release, Variant, GoldenPack, GoldenExpectations)


def encode(document: Release | Variant | GoldenPack | GoldenExpectations) -> bytes:
    """Canonical bytes of a document; their SHA-256 is its identity."""
    return canonical_json(document)


def decode(content: bytes, kind: type[Document]) -> Document:
    """Read a document whose digest the caller has verified.

    Raises:
        TrustError: malformed, too large, or of a schema newer than ours.
    """
    if len(content) > MAX_DOCUMENT_BYTES:
        raise TrustError(
            f"{kind.__name__} document has {len(content)} bytes, {MAX_DOCUMENT_BYTES} are allowed",
            hint="the release is malformed",
        )
    try:
        document = msgspec.json.decode(content, type=kind)
    except UNREADABLE_JSON as error:
        raise TrustError(
            f"{kind.__name__} document is malformed: {error}",
            hint="the release was made by a broken or newer tool",
        ) from error
    if document.schema != SCHEMA:
        raise TrustError(
            f"{kind.__name__} document has schema {document.schema}, {SCHEMA} can be read",
            hint="update slmops",
        )
    return document


def blob_of(content: bytes) -> Blob:
    """Size and digest of a small file."""
    return Blob(len(content), sha256_hex(content))


def release_digest(manifest: bytes) -> str:
    """The identity of a release: SHA-256 of its canonical manifest bytes."""
    return sha256_hex(manifest)


def golden_tokens_digest(token_ids: list[int]) -> str:
    """Digest of token ids, as :class:`GoldenExpectation` keeps it."""
    return sha256_hex(",".join(map(str, token_ids)).encode())


def encode_trace(logprobs: Sequence[float]) -> str:
    """Log-probabilities as :class:`GoldenTrace` keeps them: to a sixteenth of a nat, -15.9 at least."""
    return base64.b64encode(bytes(min(round(-16 * value), 255) for value in logprobs)).decode("ascii")


def decode_trace(text: str) -> tuple[float, ...]:
    """Log-probabilities of a :class:`GoldenTrace`.

    Raises:
        TrustError: it is no base64.
    """
    try:
        return tuple(-value / 16 for value in base64.b64decode(text, validate=True))
    except ValueError as error:
        raise TrustError(
            f"golden expectations: a trace is malformed: {error}",
            hint="the release was made by a broken tool",
        ) from error


def assignment_digest(
    *,
    release: str,
    variant: str,
    adapters: tuple[str, ...],
    prompts: tuple[str, ...],
    serving: dict[str, Any],
    golden: str,
) -> str:
    """The identity of what one device should run.

    Args:
        release: release digest.
        variant: digest of the variant manifest.
        adapters: adapter digests, in order of application.
        prompts: digests of the prompts in use.
        serving: serving settings, all of them, defaults written out.
        golden: digest of the golden expectations.
    """
    for name in (release, variant, golden, *adapters, *prompts):
        if not is_digest(name):
            raise TrustError(
                f"{name!r} is not a SHA-256 in lower-case hex",
                hint="digests name everything inside an assignment",
            )
    return digest_of(
        {
            "release": release,
            "variant": variant,
            "adapters": list(adapters),
            "prompts": list(prompts),
            "serving": serving,
            "golden": golden,
        }
    )
