"""From a build directory to a signed bundle: gates first, then manifests, then one signature over all of it."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from slmops.artifact.build_index import Build, BuiltFile, BuiltVariant
from slmops.artifact.digest import canonical_json
from slmops.artifact.lab_evidence import LAB, decode_lab, for_evidence
from slmops.artifact.manifest import (
    SCHEMA,
    ArtifactEntry,
    Base,
    Blob,
    GoldenPack,
    NamedBlob,
    Release,
    Variant,
    VariantEntry,
    Waiver,
    blob_of,
    decode,
    encode,
    release_digest,
    release_target_path,
)
from slmops.artifact.trust import add_release, load_targets, release_seq_of
from slmops.core.errors import ConflictError, GateError, UsageError
from slmops.release.build_files import read_index
from slmops.release.bundle import (
    EVIDENCE,
    EXPECTATIONS,
    GOLDEN_PACK,
    MANIFEST,
    PROMPTS,
    PROVENANCE,
    VARIANT,
    VARIANTS,
    ReleaseBundle,
    chunk_map_place,
    file_place,
    open_bundle,
    variant_folder,
)
from slmops.release.files import link_or_copy, naming_full_disks, read_by_digest, sync_folder, write_whole
from slmops.release.keys import (
    RELEASED,
    ROOT_METADATA,
    TARGETS_METADATA,
    ReleaseEntry,
    Workspace,
    open_release_key,
)

_VERSION = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")
_BLOCKING = ("fail", "error")


@dataclass(frozen=True, slots=True)
class _Made:
    """What will be in the bundle: documents by path, and links to files of the build."""

    documents: dict[str, bytes]
    links: dict[str, Path]
    entries: tuple[VariantEntry, ...]


def create_release(  # noqa: PLR0913 - each is one thing that a person decides
    build_dir: Path,
    *,
    version: str,
    workspace: Workspace,
    passphrase: str,
    waivers: Mapping[str, str],
    out_dir: Path,
    created: datetime,
) -> ReleaseBundle:
    """Sign a build as a release.

    A gate that failed or broke stops the release unless it is waived by name and reason; the waiver is signed into the
    manifest. A gate that is inconclusive does not stop it: what the build machine cannot know (speed on a device) is settled
    by later evidence, and the signed evidence says so.

    Args:
        build_dir: made by ``slmops build run``; every file is hashed again.
        version: a label; what orders releases is ``release_seq``, chosen here.
        workspace: the offline keys.
        passphrase: of the release key.
        waivers: gate (``metric`` or ``profile:metric``) to reason.
        out_dir: the new bundle directory; must not exist.
        created: UTC, signed into the manifest.

    Raises:
        GateError: a gate stops it; names each with its reason.
        UsageError: a waiver names no gate that stops anything, or the version is malformed.
        ConflictError: the version is released already, or ``out_dir`` exists.
        AuthError: wrong passphrase.
        DigestError: the build directory was changed after the build.
    """
    if not _VERSION.match(version):
        raise UsageError(
            f"version {version!r} is not valid",
            hint="letters, digits, '.', '_', '+' and '-', at most 64 characters, for example 1.0.0",
        )
    if created.tzinfo is None:
        raise UsageError("the time has no time zone", hint="give an aware UTC time")
    if out_dir.exists():
        raise ConflictError(f"{out_dir} exists already", hint="choose another --out, or remove it")
    index = read_index(build_dir)
    waived = check_gates(index, waivers)
    signer = open_release_key(workspace, passphrase)
    with workspace.locked():
        targets = workspace.read(TARGETS_METADATA)
        target_path = release_target_path(index.model, version)
        if target_path in load_targets(targets).signed.targets:
            raise ConflictError(
                f"{index.model} {version} is released already",
                hint="a version never changes: choose the next --version",
            )
        sequence = next_sequence(targets, index.model)
        made = _make(index, build_dir)
        evidence = _with_lab(made, build_dir)
        pack = decode((build_dir / index.golden_pack.path).read_bytes(), GoldenPack)
        release = Release(
            schema=SCHEMA,
            model=index.model,
            version=version,
            release_seq=sequence,
            created=created.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            base=Base(index.base.name, index.base.sha256, index.base.licence),
            licence=index.licence,
            variants=made.entries,
            golden_pack=_blob(index.golden_pack),
            evidence=blob_of(evidence),
            provenance=_blob(index.provenance),
            prompts=tuple(
                NamedBlob(name, file.bytes, file.sha256) for name, file in sorted(index.prompts.items())
            ),
            waivers=tuple(waived),
            golden_weakened=weakened(workspace, index.model, pack),
        )
        manifest = encode(release)
        signed = add_release(targets, target_path, manifest, sequence, [signer], created)
        documents = {
            MANIFEST: manifest,
            TARGETS_METADATA: signed,
            ROOT_METADATA: workspace.read(ROOT_METADATA),
            **made.documents,
            EVIDENCE: evidence,
        }
        staging = _stage(out_dir, documents, made.links)
        try:
            _record(workspace, release, release_digest(manifest), pack, signed)
            staging.replace(out_dir)
            sync_folder(out_dir.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return open_bundle(out_dir)


def check_gates(index: Build, waivers: Mapping[str, str]) -> list[Waiver]:
    """Refuse a build whose gates stop it, and give the waivers that let it through.

    Raises:
        GateError: a gate failed or broke and is not waived.
        UsageError: a waiver has no reason, or names no gate that needs one.
    """
    stopped: list[str] = []
    needed: set[str] = set()
    unsettled: set[str] = set()
    for variant in index.variants:
        for finding in variant.findings:
            names = {finding.gate, f"{variant.profile}:{finding.gate}"}
            if finding.verdict in _BLOCKING:
                needed |= names
                if not names & set(waivers):
                    stopped.append(f"{variant.profile}: {finding.gate} {finding.verdict}: {finding.reason}")
            elif finding.verdict != "pass":
                unsettled |= names
    useless = sorted(set(waivers) - needed - unsettled)
    if useless:
        raise UsageError(
            f"--waive {useless[0]}: no gate of that name stops this build",
            hint=f"gates that need one: {', '.join(sorted(n for n in needed if ':' not in n)) or 'none'}",
        )
    if any(not reason.strip() for reason in waivers.values()):
        raise UsageError("a waiver has no reason", hint="say why: --reason '...'; it is signed and shown")
    if stopped:
        raise GateError(
            "build gates did not pass:\n  " + "\n  ".join(stopped),
            hint="improve the recipe, or let it through knowingly: --waive GATE --reason '...' (signed and shown)",
            stopped=len(stopped),
        )
    return [Waiver(gate, reason.strip()) for gate, reason in sorted(waivers.items())]


def next_sequence(targets: bytes, model: str) -> int:
    """The ``release_seq`` after the highest of this model's releases."""
    prefix = f"releases/{model}/"
    known = load_targets(targets).signed.targets
    return 1 + max(
        (release_seq_of(target) for path, target in known.items() if path.startswith(prefix)), default=0
    )


def weakened(workspace: Workspace, model: str, pack: GoldenPack) -> str:
    """Words on how a pack asks less than the one of the release before; empty when it does not, or there was none."""
    before = [entry for entry in workspace.released() if entry.model == model]
    if not before:
        return ""
    last, words = before[-1], []
    if len(pack.prompts) < last.golden_prompts:
        words.append(f"{len(pack.prompts)} prompts, {last.version} had {last.golden_prompts}")
    if pack.max_drop_ratio > last.golden_max_drop_ratio:
        words.append(
            f"lets {pack.max_drop_ratio:g} of the prompts go, {last.version} let {last.golden_max_drop_ratio:g}"
        )
    return "; ".join(words)


def _make(index: Build, build_dir: Path) -> _Made:
    """Variant manifests, and where every file of the bundle comes from; model files get a second name, being read-only."""

    def content(file: BuiltFile) -> bytes:
        return read_by_digest(build_dir / file.path, file.sha256, file.bytes)

    documents = {
        GOLDEN_PACK: content(index.golden_pack),
        EVIDENCE: content(index.evidence),
        PROVENANCE: content(index.provenance),
    }
    documents |= {f"{PROMPTS}/{name}": content(file) for name, file in index.prompts.items()}
    links: dict[str, Path] = {}
    entries = []
    for built in index.variants:
        variant = _variant(index.model, built)
        variant.check_files()
        manifest = encode(variant)
        folder = f"{VARIANTS}/{variant_folder(built.profile, built.runtime.name)}"
        documents[f"{folder}/{VARIANT}"] = manifest
        documents[f"{folder}/{EXPECTATIONS}"] = content(built.golden_expectations)
        files = [(built.model, built.chunk_map), *((part.file, part.chunk_map) for part in built.parts)]
        for entry, (file, chunk_map) in zip(variant.artifacts, files, strict=True):
            documents[f"{folder}/{chunk_map_place(entry)}"] = content(chunk_map)
            links[f"{folder}/{file_place(variant, entry)}"] = build_dir / file.path
        blob = blob_of(manifest)
        entries.append(
            VariantEntry(built.profile, built.runtime.name, blob.bytes, blob.sha256, variant.artifact_bytes)
        )
    return _Made(documents, links, tuple(entries))


def _with_lab(made: _Made, build_dir: Path) -> bytes:
    """The build's evidence, and what a lab saw of these variants; entries about other variants only count as such.

    Raises:
        UsageError: there is a lab report that cannot be read.
    """
    evidence = made.documents[EVIDENCE]
    path = build_dir / LAB
    if not path.is_file():
        return evidence
    lab, stale = for_evidence(
        decode_lab(path.read_bytes(), str(path)), frozenset(entry.sha256 for entry in made.entries)
    )
    lab["entries_of_other_variants"] = len(stale)
    return canonical_json({**msgspec.json.decode(evidence), "lab": lab})


def _variant(model: str, built: BuiltVariant) -> Variant:
    artifacts = [
        ArtifactEntry(
            "model", built.path, built.format, built.model.bytes, built.model.sha256, _blob(built.chunk_map)
        )
    ]
    artifacts += [
        ArtifactEntry(
            "part", part.path, part.format, part.file.bytes, part.file.sha256, _blob(part.chunk_map)
        )
        for part in built.parts
    ]
    return Variant(
        schema=SCHEMA,
        model=model,
        profile=built.profile,
        runtime=built.runtime,
        artifacts=tuple(artifacts),
        shape=built.shape,
        golden=_blob(built.golden_expectations),
        measured=built.measured,
        quantised=built.quantised,
        also_for=built.also_for,
        predicted_decode_tps=built.predicted_decode_tps,
    )


def _stage(out_dir: Path, documents: Mapping[str, bytes], links: Mapping[str, Path]) -> Path:
    """The bundle, complete, beside its final place."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        with naming_full_disks(out_dir):
            for name, source in links.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(source, staging / name)
            for name, content in documents.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(staging / name, content)
        staging.chmod(0o755)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return staging


def _record(workspace: Workspace, release: Release, sha256: str, pack: GoldenPack, targets: bytes) -> None:
    """Remember what was signed. Before the bundle gets its name: a crash in between burns a version, it never signs two."""
    entry = ReleaseEntry(
        release.model,
        release.version,
        release.release_seq,
        sha256,
        release.created,
        len(pack.prompts),
        pack.max_drop_ratio,
    )
    lines = msgspec.json.format(msgspec.json.encode([*workspace.released(), entry]), indent=1)
    write_whole(workspace.path / TARGETS_METADATA, targets, mode=0o600)
    write_whole(workspace.path / RELEASED, lines, mode=0o600)


def _blob(file: BuiltFile) -> Blob:
    return Blob(file.bytes, file.sha256)
