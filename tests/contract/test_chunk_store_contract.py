"""One contract for the blob store, on a folder and in memory."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from slmops.artifact.digest import sha256_hex
from slmops.core.errors import DigestError, NoSpaceError, NotFoundError, UsageError
from slmops.server.adapters.chunk_directory import ChunkDirectory
from slmops.server.adapters.chunk_memory import ChunkMemory
from slmops.server.ports.world import ChunkStore

CONTENT = random.Random(5).randbytes(3_000_000)
NAME = sha256_hex(CONTENT)


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ChunkStore:
    """An empty store."""
    return (
        ChunkDirectory(tmp_path / "chunks", reserve_bytes=0) if request.param == "folder" else ChunkMemory()
    )


@pytest.fixture(params=["folder", "memory"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> ChunkStore:
    """A store without room."""
    if request.param == "folder":
        return ChunkDirectory(tmp_path / "chunks", reserve_bytes=1 << 62)
    return ChunkMemory(capacity_bytes=10)


def put(store: ChunkStore, content: bytes, name: str | None = None, piece_bytes: int = 700_001) -> None:
    """Upload in pieces."""
    with store.upload(name or sha256_hex(content), len(content)) as upload:
        for at in range(0, len(content), piece_bytes):
            upload.write(content[at : at + piece_bytes])
        upload.commit()


def test_what_goes_in_comes_out(store: ChunkStore) -> None:
    """Whole, in any range, and of the right size; again is safe."""
    put(store, CONTENT)
    put(store, CONTENT)
    assert store.size(NAME) == len(CONTENT)
    assert b"".join(store.read(NAME)) == CONTENT
    for offset, length in ((0, 1), (5, 2_000_000), (2_999_999, 1), (2_999_999, 50), (3_000_000, 5), (7, 0)):
        assert b"".join(store.read(NAME, offset, length)) == CONTENT[offset : offset + length]


def test_an_empty_blob_is_a_blob(store: ChunkStore) -> None:
    """Of no bytes."""
    put(store, b"")
    assert store.size(sha256_hex(b"")) == 0
    assert b"".join(store.read(sha256_hex(b""))) == b""


def test_what_is_missing_is_named_in_order_and_once(store: ChunkStore) -> None:
    """As asked."""
    put(store, b"here")
    a, b, here = sha256_hex(b"a"), sha256_hex(b"b"), sha256_hex(b"here")
    assert store.missing([b, here, a, b]) == [b, a]
    assert store.missing([]) == []


def test_wrong_bytes_are_refused_and_nothing_stays(store: ChunkStore, tmp_path: Path) -> None:
    """One flipped bit: both digests are named, the blob is not there, the folder holds no leftover."""
    damaged = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    with pytest.raises(DigestError) as caught:
        put(store, damaged, NAME)
    assert caught.value.fields == {"expected": NAME, "actual": sha256_hex(damaged)}
    assert store.size(NAME) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_upload_that_is_broken_off_leaves_nothing(store: ChunkStore, tmp_path: Path) -> None:
    """The client went away in the middle."""
    with pytest.raises(RuntimeError), store.upload(NAME) as upload:
        upload.write(CONTENT[:1000])
        raise RuntimeError("gone")
    assert store.size(NAME) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_store_refuses_before_the_first_byte(full: ChunkStore, tmp_path: Path) -> None:
    """By the announced size; what was there stays readable."""
    with pytest.raises(NoSpaceError):
        put(full, CONTENT)
    assert full.size(NAME) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def _climbing(name: str) -> Callable[[ChunkStore], object]:
    return lambda store: store.upload(name)


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "/", "a" * 63 + "\n"]
)
def test_only_a_digest_is_a_name(store: ChunkStore, name: str, tmp_path: Path) -> None:
    """No name leads out of the store."""
    with pytest.raises(UsageError):
        _climbing(name)(store)
    assert store.size(name) is None
    with pytest.raises(NotFoundError):
        list(store.read(name))


def test_an_unknown_blob_is_not_found(store: ChunkStore) -> None:
    """With the fix."""
    with pytest.raises(NotFoundError, match="no blob has sha256"):
        list(store.read(NAME))


def test_leftovers_of_a_crash_are_removed_when_the_folder_is_opened(tmp_path: Path) -> None:
    """An upload that a power cut broke off."""
    store = ChunkDirectory(tmp_path / "chunks", reserve_bytes=0)
    put(store, b"kept")
    (tmp_path / "chunks" / "incoming" / "half").write_bytes(b"half")
    again = ChunkDirectory(tmp_path / "chunks", reserve_bytes=0)
    files = [path.name for path in (tmp_path / "chunks").rglob("*") if path.is_file()]
    assert files == [sha256_hex(b"kept")]
    assert b"".join(again.read(sha256_hex(b"kept"))) == b"kept"


def test_a_folder_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    """Blobs can be sent again; a running server must not need a restart for that."""
    store = ChunkDirectory(tmp_path / "chunks")
    shutil.rmtree(tmp_path / "chunks")
    content = b"again"
    with store.upload(sha256_hex(content), len(content)) as upload:
        upload.write(content)
        upload.commit()
    assert b"".join(store.read(sha256_hex(content))) == content
