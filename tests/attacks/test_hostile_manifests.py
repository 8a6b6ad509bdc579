"""Attack: a signed-looking document whose contents aim at what reads them.

Digests are checked before these bytes are parsed, so such a document means a stolen release key or a broken tool;
even then nothing but a TrustError may come out, and no name may lead out of its folder.
"""

from __future__ import annotations

import msgspec
import pytest
from golden_examples import EXPECTATIONS, PACK, RELEASE, VARIANT
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.artifact import manifest as m
from slmops.core.errors import TrustError

DOCUMENTS: dict[str, msgspec.Struct] = {
    "release": RELEASE,
    "variant": VARIANT,
    "pack": PACK,
    "expectations": EXPECTATIONS,
}
HOSTILE_NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "~/x",
    "a/../../b",
    "..",
    ".",
    "./x",
    "a/./b",
    "a\\..\\b",
    "a\x00b",
    "a\nb",
    "",
    "x" * 201,
    "a/..",
]
HOSTILE_NUMBERS = [-1, 1 << 60, 1 << 63, 1 << 200, 1.5, "1", None, True, [], {}]
HOSTILE_DIGESTS = [
    "",
    "A" * 64,
    "a" * 63,
    "a" * 65,
    "a" * 64 + "\n",
    "../" + "a" * 61,
    "sha256:" + "a" * 57,
    5,
    None,
]

NAMES = [
    ("release", "model"),
    ("release", "version"),
    ("release", "prompts.0.name"),
    ("release", "adapters.0.name"),
    ("release", "variants.0.profile"),
    ("variant", "model"),
    ("variant", "profile"),
    ("variant", "artifacts.0.path"),
]
NUMBERS = [
    ("release", "release_seq"),
    ("release", "variants.0.bytes"),
    ("release", "variants.0.artifact_bytes"),
    ("release", "golden_pack.bytes"),
    ("release", "prompts.0.bytes"),
    ("variant", "artifacts.0.bytes"),
    ("variant", "artifacts.0.chunk_map.bytes"),
    ("variant", "shape.layers"),
    ("variant", "measured.rss_bytes"),
    ("variant", "quantised.Q4_1"),
]
DIGESTS = [
    ("release", "base.sha256"),
    ("release", "variants.0.sha256"),
    ("release", "evidence.sha256"),
    ("release", "provenance.sha256"),
    ("release", "adapters.0.sha256"),
    ("variant", "artifacts.0.sha256"),
    ("variant", "artifacts.0.chunk_map.sha256"),
    ("variant", "golden.sha256"),
    ("expectations", "pack_sha256"),
    ("expectations", "reference_sha256"),
    ("expectations", "expectations.0.tokens_sha256"),
]
RATIOS = [
    ("pack", "max_drop_ratio"),
    ("variant", "measured.same_top_ratio"),
    ("variant", "measured.exact_match_ratio"),
]


def forged(document: str, path: str, value: object) -> bytes:
    """A document with one value deep inside replaced."""
    content = msgspec.json.decode(msgspec.json.encode(DOCUMENTS[document]))
    at = content
    *way, last = path.split(".")
    for part in way:
        at = at[int(part)] if isinstance(at, list) else at[part]
    assert last in at
    at[last] = value
    return msgspec.json.encode(content)


def refuse(content: bytes, document: str) -> None:
    with pytest.raises(TrustError) as caught:
        m.decode(content, type(DOCUMENTS[document]))  # type: ignore[type-var]
    assert "is malformed" in caught.value.message


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
@pytest.mark.parametrize(("document", "path"), NAMES)
def test_no_name_leads_out_of_its_folder(document: str, path: str, name: str) -> None:
    refuse(forged(document, path, name), document)


@pytest.mark.parametrize(
    "number", [n for n in HOSTILE_NUMBERS if not isinstance(n, int) or abs(n) < 1 << 62], ids=repr
)
@pytest.mark.parametrize(("document", "path"), NUMBERS)
def test_no_number_is_absurd(document: str, path: str, number: object) -> None:
    refuse(forged(document, path, number), document)


@pytest.mark.parametrize("number", ["1" + "0" * 30, "1e400", "-0.5e3", "9" * 5000, "NaN", "Infinity"])
@pytest.mark.parametrize(("document", "path"), NUMBERS[:2])
def test_numbers_that_no_encoder_writes(document: str, path: str, number: str) -> None:
    content = forged(document, path, "@@")
    refuse(content.replace(b'"@@"', number.encode()), document)


@pytest.mark.parametrize("digest", HOSTILE_DIGESTS, ids=repr)
@pytest.mark.parametrize(("document", "path"), DIGESTS)
def test_no_digest_is_anything_else(document: str, path: str, digest: object) -> None:
    refuse(forged(document, path, digest), document)


@pytest.mark.parametrize("ratio", [-0.01, 1.01, 95, "0.5"])
@pytest.mark.parametrize(("document", "path"), RATIOS)
def test_no_ratio_is_a_percentage(document: str, path: str, ratio: object) -> None:
    """A golden pack with max_drop_ratio 95 would let every model through."""
    refuse(forged(document, path, ratio), document)


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b'"x"',
        b"{}",
        b"\xff\xfe",
        b"{" * 100_000,
        b'{"x":' + b"[" * 300_000,
        b'{"schema":1}',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_wrong_shapes(document: str, content: bytes) -> None:
    refuse(content, document)


def test_nesting_cannot_exhaust_the_stack() -> None:
    deep = b"[" * 500_000 + b"]" * 500_000
    content = msgspec.json.encode(RELEASE)[:-1] + b',"from_the_future":' + deep + b"}"
    refuse(content, "release")


@settings(max_examples=300)
@given(document=st.sampled_from(sorted(DOCUMENTS)), data=st.data())
def test_mutations_are_read_or_refused_and_nothing_else(document: str, data: st.DataObject) -> None:
    content = bytearray(msgspec.json.encode(DOCUMENTS[document]))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        decoded = m.decode(bytes(content), type(DOCUMENTS[document]))  # type: ignore[type-var]
    except TrustError:
        return
    assert m.decode(m.encode(decoded), type(decoded)) == decoded
