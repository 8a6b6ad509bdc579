"""A release: gates first, one signature over every byte, an order that only grows, nothing half-written."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest
from tests.support.build_directory import make_build_directory

from slmops.artifact.manifest import Release, decode, encode
from slmops.artifact.trust import load_targets, release_seq_of
from slmops.core.errors import (
    AuthError,
    ConflictError,
    DigestError,
    GateError,
    NotFoundError,
    SignatureError,
    TrustError,
    UsageError,
)
from slmops.release import (
    ReleaseBundle,
    Workspace,
    create_release,
    init_keys,
    list_releases,
    open_bundle,
    verify_bundle,
)

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "keys")
    init_keys(made, tmp_path / "server", "pass", NOW)
    return made


def release(
    tmp_path: Path, workspace: Workspace, build: Path, version: str = "1.0.0", **changes: object
) -> ReleaseBundle:
    arguments = {
        "workspace": workspace,
        "passphrase": "pass",
        "waivers": {},
        "out_dir": tmp_path / "releases" / version,
        "created": NOW,
    }
    return create_release(build, version=version, **{**arguments, **changes})  # type: ignore[arg-type]


def test_a_release_names_every_byte_and_verifies(tmp_path: Path, workspace: Workspace) -> None:
    """Manifest, variants, pack, prompts; canonical; its digest is signed; re-hashing finds nothing."""
    build = make_build_directory(
        tmp_path / "build", findings={"kld.mean": "pass", "decode_tps": "inconclusive"}
    )
    bundle = release(tmp_path, workspace, build)
    assert encode(decode(bundle.manifest, Release)) == bundle.manifest
    assert (bundle.release.release_seq, bundle.release.created, bundle.release.waivers) == (
        1,
        "2026-11-23T12:00:00Z",
        (),
    )
    assert [entry.profile for entry in bundle.release.variants] == ["pi5-8gb", "n100-16gb"]
    assert [prompt.name for prompt in bundle.release.prompts] == ["default"]
    target = load_targets(bundle.targets).signed.targets["releases/home-intents/1.0.0.json"]
    assert target.hashes["sha256"] == bundle.digest
    report = verify_bundle(open_bundle(bundle.path), workspace)
    assert (report.release_sha256, report.release_seq, report.artifacts) == (bundle.digest, 1, 2)
    assert (bundle.path / "variants" / "pi5-8gb" / "model.gguf").stat().st_nlink == 2  # no second copy
    entry, variant, _ = bundle.variants[0]
    assert variant.model_file().bytes == entry.artifact_bytes
    assert variant.measured.exact_match_ratio == 0.5


def test_a_variant_of_several_files_is_released_whole(tmp_path: Path, workspace: Workspace) -> None:
    """Two runtimes for one profile; a part may have the name of one of our own documents."""
    parts = {"variant.json": b"{}", "weights/model.onnx.data": bytes(range(256)) * 5000}
    build = make_build_directory(tmp_path / "build", parts=parts)
    bundle = release(tmp_path, workspace, build)
    runtimes = [(entry.profile, entry.runtime) for entry in bundle.release.variants]
    assert runtimes == [
        ("pi5-8gb", "llama.cpp"),
        ("n100-16gb", "llama.cpp"),
        ("pi5-8gb", "onnxruntime-genai"),
    ]
    entry, variant, folder = bundle.variants[2]
    assert [(a.role, a.path) for a in variant.artifacts] == [
        ("model", "genai_config.json"),
        *(("part", name) for name in parts),
    ]
    assert entry.artifact_bytes == sum(artifact.bytes for artifact in variant.artifacts)
    assert (folder / "files" / "weights" / "model.onnx.data").read_bytes() == parts["weights/model.onnx.data"]
    assert verify_bundle(open_bundle(bundle.path), workspace).artifacts == 5
    chunks = {blob.sha256 for blob in bundle.blobs()}
    for artifact in variant.artifacts:
        assert {chunk.sha256 for chunk in bundle.chunk_map(artifact, folder).chunks} <= chunks
    damaged = folder / "files" / "variant.json"
    damaged.unlink()
    damaged.write_bytes(b"[]")
    with pytest.raises(DigestError):
        verify_bundle(open_bundle(bundle.path), workspace)


def test_failing_gates_stop_it_and_are_named(tmp_path: Path, workspace: Workspace) -> None:
    """Exit code 5, each gate with its reason, nothing signed, nothing written."""
    build = make_build_directory(
        tmp_path / "build",
        findings={"kld.mean": "fail", "task.exact_match": "error", "decode_tps": "inconclusive"},
    )
    targets = workspace.read("targets.json")
    with pytest.raises(GateError, match=r"kld\.mean says fail") as caught:
        release(tmp_path, workspace, build)
    assert caught.value.exit_code == 5
    assert "pi5-8gb: task.exact_match error" in caught.value.message
    assert "decode_tps" not in caught.value.message
    assert workspace.read("targets.json") == targets
    assert not (tmp_path / "releases").exists()


def test_a_waiver_is_signed_with_its_reason(tmp_path: Path, workspace: Workspace) -> None:
    """By metric for all variants, or for one profile only; what remains stops."""
    build = make_build_directory(tmp_path / "build", findings={"kld.mean": "fail"})
    with pytest.raises(GateError, match=r"n100-16gb: kld\.mean") as caught:
        release(tmp_path, workspace, build, waivers={"pi5-8gb:kld.mean": "known"})
    assert "pi5-8gb: kld.mean" not in caught.value.message
    bundle = release(tmp_path, workspace, build, waivers={"kld.mean": " a drill "})
    assert [(waiver.gate, waiver.reason) for waiver in bundle.release.waivers] == [("kld.mean", "a drill")]


@pytest.mark.parametrize(
    ("waivers", "message"),
    [
        ({"kld.men": "typo"}, "no gate of that name"),
        ({"same_top.ratio": "passes"}, "no gate of that name"),
        ({"kld.mean": " "}, "no reason"),
    ],
)
def test_a_waiver_must_be_meant(
    tmp_path: Path, workspace: Workspace, waivers: dict[str, str], message: str
) -> None:
    """A typo, a gate that passed, an empty reason: refused."""
    build = make_build_directory(tmp_path / "build", findings={"kld.mean": "fail", "same_top.ratio": "pass"})
    with pytest.raises(UsageError, match=message):
        release(tmp_path, workspace, build, waivers=waivers)


def test_releases_of_a_model_are_ordered(tmp_path: Path, workspace: Workspace) -> None:
    """The number grows by one for each release of a model, whatever the label says; other models count for themselves."""
    build = make_build_directory(tmp_path / "build")
    other = make_build_directory(tmp_path / "other", model="other")
    found = [release(tmp_path, workspace, build, version) for version in ("2.0.0", "1.0.0-rc1")]
    found.append(release(tmp_path, workspace, other, "0.1"))
    assert [bundle.release.release_seq for bundle in found] == [1, 2, 1]
    assert [(entry.model, entry.version, entry.release_seq) for entry in list_releases(workspace)] == [
        ("home-intents", "2.0.0", 1),
        ("home-intents", "1.0.0-rc1", 2),
        ("other", "0.1", 1),
    ]
    targets = load_targets(workspace.read("targets.json")).signed
    assert (targets.version, sorted(release_seq_of(target) for target in targets.targets.values())) == (
        4,
        [1, 1, 2],
    )


def test_a_version_never_changes(tmp_path: Path, workspace: Workspace) -> None:
    """The same version again is refused, the same place, too."""
    build = make_build_directory(tmp_path / "build")
    release(tmp_path, workspace, build)
    with pytest.raises(ConflictError, match="released already"):
        release(tmp_path, workspace, build, out_dir=tmp_path / "elsewhere")
    with pytest.raises(ConflictError, match="exists already"):
        release(tmp_path, workspace, build, "1.0.1", out_dir=tmp_path / "releases" / "1.0.0")
    for version in ("", "../1", "1 0", "x" * 80):
        with pytest.raises(UsageError, match="not valid"):
            release(tmp_path, workspace, build, version, out_dir=tmp_path / "v")


def test_a_weaker_golden_pack_is_said(tmp_path: Path, workspace: Workspace) -> None:
    """Fewer prompts or a larger allowance is a signed, visible field; asking more is not."""
    release(tmp_path, workspace, make_build_directory(tmp_path / "b1", golden_prompts=4), "1")
    weaker = release(
        tmp_path, workspace, make_build_directory(tmp_path / "b2", golden_prompts=2, max_drop_ratio=0.5), "2"
    )
    assert weaker.release.golden_weakened == "2 prompts, 1 had 4; lets 0.5 of the prompts go, 1 let 0"
    stronger = release(tmp_path, workspace, make_build_directory(tmp_path / "b3", golden_prompts=8), "3")
    assert stronger.release.golden_weakened == ""


def test_what_was_changed_after_the_build_is_not_signed(tmp_path: Path, workspace: Workspace) -> None:
    """The evidence would speak of another file."""
    build = make_build_directory(tmp_path / "build")
    path = build / "variants" / "pi5-8gb" / "model.gguf"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DigestError, match="evidence is not about it"):
        release(tmp_path, workspace, build)
    path.unlink()
    with pytest.raises(NotFoundError, match="missing"):
        release(tmp_path, workspace, build)
    with pytest.raises(NotFoundError, match="no build directory"):
        release(tmp_path, workspace, tmp_path)


def test_the_wrong_passphrase_signs_nothing(tmp_path: Path, workspace: Workspace) -> None:
    """And leaves nothing behind."""
    with pytest.raises(AuthError):
        release(tmp_path, workspace, make_build_directory(tmp_path / "build"), passphrase="wrong")
    assert not (tmp_path / "releases").exists()


@pytest.mark.parametrize(
    "name",
    [
        "variants/pi5-8gb/model.gguf",
        "golden-pack.json",
        "variants/n100-16gb/golden-expectations.json",
        "prompts/default",
        "release.json",
    ],
)
def test_a_flipped_byte_is_found(tmp_path: Path, workspace: Workspace, name: str) -> None:
    """Anywhere in the bundle."""
    bundle = release(tmp_path, workspace, make_build_directory(tmp_path / "build"))
    path = bundle.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(TrustError):
        verify_bundle(open_bundle(bundle.path), workspace)


def test_another_signer_is_refused(tmp_path: Path, workspace: Workspace) -> None:
    """A bundle proves nothing to a workspace whose keys did not sign it."""
    bundle = release(tmp_path, workspace, make_build_directory(tmp_path / "build"))
    stranger = Workspace(tmp_path / "stranger")
    init_keys(stranger, tmp_path / "server-2", "pass", NOW)
    with pytest.raises(SignatureError):
        verify_bundle(bundle, stranger)
    with pytest.raises(NotFoundError, match="no release bundle"):
        open_bundle(tmp_path)
