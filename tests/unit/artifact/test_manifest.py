"""Reading manifests that others wrote: what is ignored, what is refused."""

from __future__ import annotations

import msgspec
import pytest
from golden_examples import EXPECTATIONS, MANIFESTS, PACK, RELEASE, VARIANT, fake

from slmops.artifact import manifest as m
from slmops.core.errors import TrustError


def altered(document: msgspec.Struct, **fields: object) -> bytes:
    """A document's bytes with some top-level fields replaced."""
    return msgspec.json.encode({**msgspec.to_builtins(document), **fields})


@pytest.mark.parametrize("name", MANIFESTS)
def test_unknown_fields_are_ignored(name: str) -> None:
    """A newer tool may add fields; what we read is the same."""
    document = MANIFESTS[name]
    assert isinstance(document, msgspec.Struct)
    assert m.decode(altered(document, from_the_future={"x": [1]}), type(document)) == document  # type: ignore[type-var]


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("schema", [0, 2, 99])
def test_another_schema_is_refused(name: str, schema: int) -> None:
    document = MANIFESTS[name]
    assert isinstance(document, msgspec.Struct)
    with pytest.raises(
        TrustError, match=rf"{type(document).__name__} document has schema {schema}, 1 can be read"
    ):
        m.decode(altered(document, schema=schema), type(document))  # type: ignore[type-var]


def test_a_variant_without_a_model_file_is_refused() -> None:
    variant = m.decode(altered(VARIANT, artifacts=[]), m.Variant)
    with pytest.raises(TrustError, match="no file with role 'model'"):
        variant.model_file()
    entry = msgspec.structs.replace(VARIANT.artifacts[0], role="tokenizer")
    both = msgspec.structs.replace(VARIANT, artifacts=(entry, *VARIANT.artifacts))
    assert both.model_file().role == "model"


def with_files(*files: tuple[str, str]) -> m.Variant:
    return msgspec.structs.replace(
        VARIANT,
        artifacts=tuple(
            msgspec.structs.replace(VARIANT.artifacts[0], role=role, path=path) for role, path in files
        ),
    )


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ([("part", "a")], "exactly one"),
        ([("model", "a"), ("model", "b")], "exactly one"),
        ([("model", "a"), ("hook", "b")], "role 'hook'"),
        ([("model", "a"), ("part", "A")], "want the place 'a'"),
        ([("model", "a"), ("part", "a/b")], "want the place 'a'"),
        ([("model", "a"), *(("part", f"p{i}") for i in range(256))], "257 files, 256 are allowed"),
    ],
)
def test_files_that_cannot_lie_in_one_folder_are_refused(files: list[tuple[str, str]], why: str) -> None:
    with pytest.raises(TrustError, match=why):
        with_files(*files).check_files()


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../b", "~/x", "a\\b", "", "a/."])
def test_a_file_that_leads_out_of_its_folder_is_not_even_read(path: str) -> None:
    artifacts = [msgspec.to_builtins(VARIANT.artifacts[0]) | {"path": path}]
    with pytest.raises(TrustError):
        m.decode(altered(VARIANT, artifacts=artifacts), m.Variant)


def test_a_lone_gguf_is_opened_by_digest_and_anything_else_in_a_folder() -> None:
    assert not VARIANT.in_folder
    assert with_files(("model", "a"), ("part", "b/c")).in_folder
    tflite = msgspec.structs.replace(VARIANT.artifacts[0], format="tflite")
    assert msgspec.structs.replace(VARIANT, artifacts=(tflite,)).in_folder


def test_a_variant_without_its_shape_is_refused() -> None:
    shape = {name: value for name, value in VARIANT.shape.items() if name != "layers"}
    variant = m.decode(altered(VARIANT, shape={**shape, "more": 1}), m.Variant)
    with pytest.raises(TrustError, match=r"no shape\.layers"):
        variant.model_shape()


def test_a_document_beyond_all_measure_is_not_even_parsed() -> None:
    with pytest.raises(TrustError, match="16777217 bytes, 16777216 are allowed"):
        m.decode(b" " * (m.MAX_DOCUMENT_BYTES + 1), m.Release)


@pytest.mark.parametrize("part", ["release", "variant", "golden", "adapters", "prompts"])
@pytest.mark.parametrize("bad", ["", "A" * 64, "a" * 64 + "\n", "latest"])
def test_an_assignment_is_named_by_digests_only(part: str, bad: str) -> None:
    parts: dict[str, object] = {
        "release": fake("a"),
        "variant": fake("b"),
        "adapters": (),
        "prompts": (),
        "serving": {},
        "golden": fake("c"),
    }
    parts[part] = (bad,) if part in ("adapters", "prompts") else bad
    with pytest.raises(TrustError, match="is not a SHA-256"):
        m.assignment_digest(**parts)  # type: ignore[arg-type]


def test_the_examples_are_what_they_claim() -> None:
    assert RELEASE.waivers and RELEASE.golden_weakened
    assert EXPECTATIONS.pack_sha256 == RELEASE.golden_pack.sha256
    assert {prompt.id for prompt in PACK.prompts} == {expected.id for expected in EXPECTATIONS.expectations}
