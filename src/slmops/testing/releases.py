"""Signed releases for tests: real TUF metadata, real manifests and chunk maps, golden expectations from a real engine.

Small and quick with the fake runtime, but nothing about them is fake: a device that accepts them checked everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from securesystemslib.signer import CryptoSigner

from slmops.artifact.chunkmap import encode_chunk_map, make_chunk_map
from slmops.artifact.digest import sha256_hex
from slmops.artifact.manifest import (
    SCHEMA,
    ArtifactEntry,
    Base,
    Blob,
    GoldenExpectation,
    GoldenExpectations,
    GoldenMessage,
    GoldenPack,
    GoldenPrompt,
    Measured,
    NamedBlob,
    Release,
    RuntimeNeed,
    Variant,
    VariantEntry,
    assignment_digest,
    blob_of,
    encode,
    golden_tokens_digest,
)
from slmops.artifact.trust import add_release, check_root, new_root, new_targets, publish
from slmops.protocol.messages import SCHEMA as MESSAGE_SCHEMA
from slmops.protocol.messages import Assignment, NamedDigest, ServingSettings
from slmops.runtimes import EngineSpec, load, open_engine

SERVING = ServingSettings(
    context_tokens=512, kv_cache="q8_0", parallel=2, micro_batch_tokens=64, system_prompt=""
)
#: shape of the fake model, small enough for any device
SHAPE = {
    "weights_bytes": 1_000_000,
    "parameters": 1_000_000,
    "layers": 2,
    "k_width": 64,
    "v_width": 64,
    "hidden": 64,
    "ffn": 256,
    "vocabulary": 258,
    "context_max_tokens": 8192,
}


@dataclass(frozen=True, slots=True)
class MadeRelease:
    """A release that was made, and what is needed to assign it."""

    release: Release
    digest: str
    variant: Variant
    variant_digest: str

    def assignment(
        self,
        generation: int,
        *,
        rollout_id: str = "rollout-1",
        serving: ServingSettings = SERVING,
        probation_min_s: float = 0.0,
        min_decode_tps: float | None = None,
    ) -> Assignment:
        """The order to run this release."""
        prompts = tuple(
            NamedDigest(p.name, p.sha256, p.bytes)
            for p in self.release.prompts
            if p.name == serving.system_prompt
        )
        digest = assignment_digest(
            release=self.digest,
            variant=self.variant_digest,
            adapters=(),
            prompts=tuple(p.sha256 for p in prompts),
            serving=msgspec.to_builtins(serving),
            golden=self.variant.golden.sha256,
        )
        return Assignment(
            schema=MESSAGE_SCHEMA,
            generation=generation,
            action="run",
            assignment_digest=digest,
            rollout_id=rollout_id,
            model=self.release.model,
            version=self.release.version,
            release_sha256=self.digest,
            release_seq=self.release.release_seq,
            target_path=self.release.target_path(),
            variant_sha256=self.variant_digest,
            prompts=prompts,
            serving=serving,
            probation_min_s=probation_min_s,
            min_decode_tps=min_decode_tps,
        )


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass
class SignedReleases:
    """A TUF repository with its keys, and every blob of its releases.

    Attributes:
        blobs: digest to bytes, as ``GET /v1/chunks/sha256/{hex}`` serves them.
        tuf: file name to bytes, as ``GET /v1/tuf/{file}`` serves them.
    """

    model: str = "assistant"
    blobs: dict[str, bytes] = field(default_factory=dict)
    tuf: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make keys and an empty, published repository."""
        self.root_signer = CryptoSigner.generate_ecdsa()
        self.release_signer = CryptoSigner.generate_ecdsa()
        self.online_signer = CryptoSigner.generate_ecdsa()
        now = _utc_now()
        self.root = new_root(
            [self.root_signer], [self.release_signer.public_key], [self.online_signer.public_key], now
        )
        self.targets = new_targets([self.release_signer], now)
        self.tuf["1.root.json"] = self.root
        self._snapshot: bytes | None = None
        self._publish()
        self._seq = 0

    def _publish(self) -> None:
        files = publish(
            check_root(self.root),
            self.targets,
            self._snapshot,
            self.tuf.get("timestamp.json"),
            self.online_signer,
            _utc_now(),
        )
        self._snapshot = next(content for name, content in files.items() if name.endswith("snapshot.json"))
        self.tuf.update(files)

    async def add(  # noqa: PLR0913 - what a release is made of
        self,
        model_file: Path,
        version: str,
        questions: Mapping[str, str],
        *,
        runtime: str,
        profile: str = "pi5-8gb",
        artifact_format: str = "raw",
        tolerance: float = 0.05,
        floor_margin: float = 1.0,
        prompts: Mapping[str, str] | None = None,
        shape: Mapping[str, int] | None = None,
        golden_from: Path | None = None,
        parts: Mapping[str, bytes] | None = None,
    ) -> MadeRelease:
        """Sign and publish a release of one variant.

        Args:
            model_file: the variant's file.
            version: label.
            questions: golden prompts: user message to the answer that must stay likely.
            runtime: engine name; it is started to compute the expectations.
            profile: the variant's profile.
            artifact_format: ``gguf`` or ``raw``.
            tolerance: of every expectation, nats.
            floor_margin: how far below the reference a later release may lie, nats.
            prompts: system prompts by name.
            shape: of the model; the fake's by default.
            golden_from: file that the expectations are computed from; the model itself by default.
            parts: further files of the variant, by their names in its folder.
        """
        files = [self._keep_file("model", model_file.name, artifact_format, model_file.read_bytes())]
        files += [self._keep_file("part", name, "raw", content) for name, content in (parts or {}).items()]
        pack = GoldenPack(
            SCHEMA,
            tuple(
                GoldenPrompt(f"q{i}", (GoldenMessage("user", q),), a)
                for i, (q, a) in enumerate(questions.items())
            ),
        )
        pack_blob = self._keep(encode(pack))
        expectations = await _expect(
            golden_from or model_file, pack, pack_blob.sha256, runtime, tolerance, floor_margin
        )
        variant = Variant(
            schema=SCHEMA,
            model=self.model,
            profile=profile,
            runtime=RuntimeNeed(runtime, "1"),
            artifacts=tuple(files),
            shape=dict(shape or SHAPE),
            golden=self._keep(encode(expectations)),
            measured=Measured(4.5, 0.01, 0.99, 12.0, 50.0, 200.0, 0.3, 100_000_000),
            quantised={"F16": 1},
        )
        variant_blob = self._keep(encode(variant))
        self._seq += 1
        release = Release(
            schema=SCHEMA,
            model=self.model,
            version=version,
            release_seq=self._seq,
            created="2026-01-01T00:00:00Z",
            base=Base("fake", sha256_hex(b"base"), "apache-2.0"),
            licence="apache-2.0",
            variants=(
                VariantEntry(
                    profile, runtime, variant_blob.bytes, variant_blob.sha256, variant.artifact_bytes
                ),
            ),
            golden_pack=pack_blob,
            evidence=self._keep(b'{"gates":[],"schema":1}'),
            provenance=self._keep(b'{"schema":1}'),
            prompts=tuple(self._keep_named(name, text) for name, text in (prompts or {}).items()),
        )
        manifest = encode(release)
        digest = self._keep(manifest).sha256
        self.targets = add_release(
            self.targets, release.target_path(), manifest, self._seq, [self.release_signer], _utc_now()
        )
        self._publish()
        return MadeRelease(release, digest, variant, variant_blob.sha256)

    def _keep_file(self, role: str, path: str, file_format: str, content: bytes) -> ArtifactEntry:
        chunk_map = make_chunk_map(content, file_format)
        for offset, chunk in chunk_map.offsets():
            self.blobs[chunk.sha256] = content[offset : offset + chunk.bytes]
        blob = self._keep(encode_chunk_map(chunk_map))
        return ArtifactEntry(role, path, file_format, len(content), sha256_hex(content), blob)

    def _keep(self, content: bytes) -> Blob:
        blob = blob_of(content)
        self.blobs[blob.sha256] = content
        return blob

    def _keep_named(self, name: str, text: str) -> NamedBlob:
        blob = self._keep(text.encode())
        return NamedBlob(name, blob.bytes, blob.sha256)


async def _expect(
    path: Path, pack: GoldenPack, pack_digest: str, runtime: str, tolerance: float, floor_margin: float
) -> GoldenExpectations:
    """Expectations from an engine that really loads the file."""
    expected: list[GoldenExpectation] = []
    async with open_engine(
        EngineSpec(
            runtime=runtime,
            model_path=path,
            context_tokens=SERVING.context_tokens,
            kv_cache=load(runtime).capabilities.kv_cache_for("f16"),
        ),
        timeout_s=60,
    ) as engine:
        for prompt in pack.prompts:
            asked = await engine.apply_template(
                [{"role": m.role, "content": m.content} for m in prompt.messages]
            )
            tokens = [*asked, *await engine.tokenize(prompt.answer, add_special=False, parse_special=False)]
            score = await engine.score(tokens, start=len(asked))
            reference = -score.mean_nll
            if not math.isfinite(reference):
                raise ValueError(f"{prompt.id}: reference log-probability is {reference}")
            expected.append(
                GoldenExpectation(
                    prompt.id, golden_tokens_digest(tokens), reference, tolerance, reference - floor_margin
                )
            )
    return GoldenExpectations(SCHEMA, pack_digest, sha256_hex(path.read_bytes()), tuple(expected))
