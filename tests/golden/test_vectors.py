"""Golden vectors: the formats byte by byte, and the identities that hang on them.

These files are never regenerated. If one of these tests fails, the format changed: devices in the field would
compute other digests. Make a new schema version and a new folder instead.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
import rfc8785
from golden_examples import CHUNK_MAP, MANIFESTS, MESSAGES, SHAPE, fake

from slmops.artifact import manifest
from slmops.artifact.chunkmap import decode_chunk_map, encode_chunk_map
from slmops.artifact.digest import canonical_json
from slmops.core.device.fit import ModelShape
from slmops.protocol import messages

FOLDER = Path(__file__).parent / "v1"
#: SHA-256 of each file: what a release, a variant, a pack and an expectation of these contents are called
DIGESTS = {
    "release": "cac6c8fa66152bc27c2131d8db969e93c8e342371b1cef4dd514e0c2863a9a8b",
    "variant": "1e2c4d305a929b1dbd71b014d2df6f82d493ec18560eee4c4bf872943fff4f4b",
    "golden-pack": "7cccc8e8a3c09defef9b9dc0233ec457b2455b8a465bc0417f6fd5f3811bb516",
    "golden-expectations": "2387a7322a6795d8c73eaf79d6eb263c48ce17767825a7c1be6b55af67b6d88f",
    "golden-expectations-traced": "28a33b4b2d10fa04bb9a217086aa74a7e5479befa6f91515295ce6318d27118a",
    "chunk-map": "2293b8f3a179c364b5b55f0f63343f7cce8a70e068c6e569792fdd28174c5e01",
}


def golden(name: str) -> bytes:
    return (FOLDER / f"{name}.json").read_bytes()


def test_no_vector_is_missing_or_forgotten() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*MANIFESTS, *MESSAGES, "chunk-map", "canonical"}
    assert set(DIGESTS) == {*MANIFESTS, "chunk-map"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_to_the_byte(name: str) -> None:
    example = MANIFESTS[name]
    assert manifest.encode(example) == golden(name)  # type: ignore[arg-type]
    assert manifest.decode(golden(name), type(example)) == example  # type: ignore[type-var]
    assert hashlib.sha256(golden(name)).hexdigest() == DIGESTS[name]


def test_the_chunk_map_to_the_byte() -> None:
    assert encode_chunk_map(CHUNK_MAP) == golden("chunk-map")
    assert decode_chunk_map(golden("chunk-map")) == CHUNK_MAP
    assert hashlib.sha256(golden("chunk-map")).hexdigest() == DIGESTS["chunk-map"]


@pytest.mark.parametrize("name", [*MANIFESTS, "chunk-map"])
def test_identities_are_those_of_the_canonical_form(name: str) -> None:
    """Any RFC 8785 implementation gets the same bytes from the parsed JSON."""
    assert rfc8785.dumps(json.loads(golden(name))) == golden(name)


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_to_the_byte(name: str) -> None:
    """Every message, with all of its fields and with the least of them."""
    example = MESSAGES[name]
    assert messages.encode(example) == golden(name)
    assert messages.decode(golden(name), type(example)) == example  # type: ignore[type-var]


def test_the_examples_use_every_field() -> None:
    """A field that no vector holds could change its name unseen."""
    used: dict[type, set[str]] = {}

    def visit(value: object) -> None:
        if isinstance(value, msgspec.Struct):
            present = msgspec.json.decode(msgspec.json.encode(value))
            used.setdefault(type(value), set()).update(present)
            for field in value.__struct_fields__:
                visit(getattr(value, field))
        elif isinstance(value, tuple):
            for item in value:
                visit(item)

    for example in [*MANIFESTS.values(), *MESSAGES.values(), CHUNK_MAP]:
        visit(example)
    for module in (manifest, messages):
        for kind in vars(module).values():
            if (
                isinstance(kind, type)
                and issubclass(kind, msgspec.Struct)
                and kind.__module__ == module.__name__
            ):
                assert set(kind.__struct_fields__) == used[kind], kind


def test_fields_at_their_default_are_left_out() -> None:
    """So that a field added later does not change the identity of what does not use it."""
    idle = json.loads(golden("checkin-request-idle"))
    assert idle == {"schema": 1, "boot_id": "b-1", "seq": 1, "generation": 0, "phase": "idle"}


# ---- identities ------------------------------------------------------------------------------------------------

ASSIGNMENT = {
    "release": fake("7"),
    "variant": fake("e"),
    "adapters": (fake("3"),),
    "prompts": (fake("2"),),
    "serving": {
        "context_tokens": 2048,
        "kv_cache": "q8_0",
        "parallel": 2,
        "micro_batch_tokens": 64,
        "system_prompt": "default",
    },
    "golden": fake("c"),
}


def test_assignment_digest() -> None:
    """The identity that "running equals assigned" compares, with its preimage written out."""
    preimage = (
        '{"adapters":["' + fake("3") + '"],"golden":"' + fake("c") + '","prompts":["' + fake("2") + '"],'
        '"release":"'
        + fake("7")
        + '","serving":{"context_tokens":2048,"kv_cache":"q8_0","micro_batch_tokens":64,'
        '"parallel":2,"system_prompt":"default"},"variant":"' + fake("e") + '"}'
    )
    digest = manifest.assignment_digest(**ASSIGNMENT)  # type: ignore[arg-type]
    assert digest == hashlib.sha256(preimage.encode()).hexdigest()
    assert digest == "18994fcd352a6f21828a74626eabc7cd491f25dcd67beab89f08d280ec5d494b"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("release", fake("f")),
        ("variant", fake("f")),
        ("adapters", ()),
        ("adapters", (fake("3"), fake("3"))),
        ("prompts", (fake("f"),)),
        ("serving", {"context_tokens": 4096}),
        ("golden", fake("f")),
    ],
)
def test_every_part_changes_the_assignment_digest(part: str, value: object) -> None:
    changed = {**ASSIGNMENT, part: value}
    assert manifest.assignment_digest(**changed) != manifest.assignment_digest(**ASSIGNMENT)  # type: ignore[arg-type]


def test_the_order_of_adapters_matters() -> None:
    one = manifest.assignment_digest(**{**ASSIGNMENT, "adapters": (fake("1"), fake("2"))})  # type: ignore[arg-type]
    other = manifest.assignment_digest(**{**ASSIGNMENT, "adapters": (fake("2"), fake("1"))})  # type: ignore[arg-type]
    assert one != other


def test_release_digest_and_path() -> None:
    assert manifest.release_digest(golden("release")) == DIGESTS["release"]
    release = manifest.decode(golden("release"), manifest.Release)
    assert release.target_path() == "releases/home-intents/1.2.0.json"


def test_golden_tokens_digest() -> None:
    """Token ids, decimal, comma-separated: ``printf 1,22,333 | sha256sum``."""
    assert manifest.golden_tokens_digest([1, 22, 333]) == hashlib.sha256(b"1,22,333").hexdigest()
    assert (
        manifest.golden_tokens_digest([1, 22, 333])
        == "8915516745284e69425d3f566025a855f5a5718d6d44f09451fb19d0f61fc185"
    )


def test_the_variants_shape_and_model_file() -> None:
    variant = manifest.decode(golden("variant"), manifest.Variant)
    assert variant.model_shape() == ModelShape(**SHAPE)
    assert variant.model_file().path == "home-intents-pi5-8gb.gguf"
    assert manifest.blob_of(b"abc") == manifest.Blob(3, hashlib.sha256(b"abc").hexdigest())


def test_canonical_json_vectors() -> None:
    """RFC 8785 section 3.2 and appendix B: numbers, key order by UTF-16, escapes."""
    cases = json.loads((FOLDER / "canonical.json").read_text(encoding="utf-8"))
    assert len(cases) >= 8
    for case in cases:
        assert canonical_json(case["value"]).decode() == case["canonical"], case
