"""Files by digest, written in place from chunks: whatever interrupts it, what is named is whole."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slmops.agent.store.artifacts import ArtifactStore, LocalChunks
from slmops.agent.store.layout import Layout
from slmops.artifact.chunkmap import ChunkMap, encode_chunk_map, make_chunk_map
from slmops.artifact.digest import sha256_hex
from slmops.core.errors import BugError, DigestError


@functools.lru_cache
def _content(seed: int = 0, size: int = 3_000_000) -> bytes:
    return random.Random(seed).randbytes(size)


@functools.lru_cache
def _map(seed: int) -> ChunkMap:
    return make_chunk_map(_content(seed), "raw")


def _store(folder: Path) -> ArtifactStore:
    layout = Layout(folder)
    layout.make()
    return ArtifactStore(layout)


def _chunk(content: bytes, chunk_map: ChunkMap, index: int) -> tuple[int, bytes]:
    offset, chunk = list(chunk_map.offsets())[index]
    return offset, content[offset : offset + chunk.bytes]


class AssemblyMachine(RuleBasedStateMachine):
    """Chunks in any order, power cuts anywhere, garbage in the bitmap's tail: the file is whole or has no name."""

    @initialize(seed=st.integers(0, 3))
    def begin(self, seed: int) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = _store(Path(self.folder.name))
        self.content = _content(seed)
        self.map = _map(seed)
        self.assembly = self.store.assembly(self.map)
        self.written: set[int] = set()

    @rule(choice=st.integers(0, 1000))
    def write_a_missing_chunk(self, choice: int) -> None:
        missing = list(self.assembly.missing())
        if missing and not self.finished():
            index, offset, sha256, size = missing[choice % len(missing)]
            piece = self.content[offset : offset + size]
            assert sha256_hex(piece) == sha256
            self.assembly.write(index, offset, piece)
            self.written.add(index)

    @rule()
    def power_cut(self) -> None:
        if not self.finished():
            self.assembly = self.store.assembly(self.map)

    @rule(extra=st.binary(min_size=1, max_size=3))
    def bitmap_is_torn(self, extra: bytes) -> None:
        """A bitmap of another length is not believed: everything is fetched again, nothing is lost but time."""
        path = self.store.path(self.map.artifact_sha256).with_name(self.map.artifact_sha256 + ".bitmap")
        if path.exists() and not self.finished():
            path.write_bytes(path.read_bytes() + extra)
            self.assembly = self.store.assembly(self.map)
            self.written.clear()

    @precondition(lambda self: not list(self.assembly.missing()) and not self.finished())
    @rule()
    def finish(self) -> None:
        self.assembly.finish()
        assert self.store.path(self.map.artifact_sha256).read_bytes() == self.content

    def finished(self) -> bool:
        return self.store.has(self.map.artifact_sha256)

    @invariant()
    def what_was_written_is_remembered(self) -> None:
        if hasattr(self, "map") and not self.finished():
            assert {index for index, *_ in self.assembly.missing()} == set(
                range(len(self.map.chunks))
            ) - self.written

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestAssembly = AssemblyMachine.TestCase
TestAssembly.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_a_chunk_damaged_on_disk_is_found_before_the_file_gets_its_name(tmp_path: Path) -> None:
    store, content = _store(tmp_path), _content()
    chunk_map = make_chunk_map(content, "raw")
    assembly = store.assembly(chunk_map)
    for index, offset, _, size in list(assembly.missing()):
        assembly.write(index, offset, content[offset : offset + size])
    partial = store.path(chunk_map.artifact_sha256).with_name(chunk_map.artifact_sha256 + ".partial")
    with partial.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    with pytest.raises(DigestError):
        assembly.finish()
    assert not store.has(chunk_map.artifact_sha256)
    assert not partial.exists()


def test_a_file_damaged_later_is_found_by_its_hash(tmp_path: Path) -> None:
    store, good = _store(tmp_path), sha256_hex(b"good")
    assert not store.is_whole(good)
    store.put_blob(good, b"good")
    assert store.is_whole(good)
    store.path(good).write_bytes(b"evil")
    assert not store.is_whole(good)
    store.path(good).unlink()
    with pytest.raises(DigestError, match="not on disk"):
        store.read_blob(good)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("damage", ["flip", "truncate", "append"])
def test_a_damaged_file_gives_up_its_name_and_keeps_its_whole_chunks(
    tmp_path: Path, in_place: bool, damage: str
) -> None:
    """Mended from what is whole in it; what an engine has mapped is not written to."""
    store, content = _store(tmp_path), _content()
    chunk_map = make_chunk_map(content, "raw")
    encoded = encode_chunk_map(chunk_map)
    map_sha256 = sha256_hex(encoded)
    store.put_blob(map_sha256, encoded)
    store.put_blob(chunk_map.artifact_sha256, content)
    path = store.path(chunk_map.artifact_sha256)
    with path.open("r+b") as file:
        if damage == "flip":
            file.seek(len(content) // 2)
            file.write(bytes([content[len(content) // 2] ^ 1]))
        elif damage == "truncate":
            file.truncate(len(content) // 2)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"more")
    damaged = path.read_bytes()
    with path.open("rb") as mapped:
        store.salvage(chunk_map, in_place=in_place)
        assert not store.has(chunk_map.artifact_sha256)
        if not in_place:
            assert mapped.read() == damaged
    local = LocalChunks(store, [(chunk_map.artifact_sha256, map_sha256)])
    assembly = store.assembly(chunk_map)
    fetched = 0
    for index, offset, sha256, size in list(assembly.missing()):
        piece = local.get(sha256)
        if piece is None:
            piece = content[offset : offset + size]
            fetched += size
        assembly.write(index, offset, piece)
    assembly.finish()
    assert path.read_bytes() == content
    assert fetched < len(content) and (fetched > 0) == (damage != "append")
    assert sorted(p.name for p in Layout(tmp_path).artifacts.iterdir()) == sorted([path.name, map_sha256])


def test_a_power_cut_while_salvaging_loses_nothing_but_the_name(tmp_path: Path) -> None:
    """The bitmap comes before the rename: alone it means nothing, and the damaged file is salvaged again."""
    store, content = _store(tmp_path), _content()
    chunk_map = make_chunk_map(content, "raw")
    path = store.path(chunk_map.artifact_sha256)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    path.with_name(path.name + ".bitmap").write_bytes(b"\x01" * len(chunk_map.chunks))
    assert store.assembly(chunk_map).missing_bytes == len(content)
    store.salvage(chunk_map, in_place=True)
    assert 0 < store.assembly(chunk_map).missing_bytes < len(content)


def test_garbage_includes_what_was_put_aside(tmp_path: Path) -> None:
    store, kept = _store(tmp_path), sha256_hex(b"kept")
    store.put_blob(kept, b"kept")
    store.path(kept).with_name(f"{kept}.damaged").write_bytes(b"evil")
    assert store.collect_garbage({kept}) == len(b"evil")
    assert store.has(kept)


def test_wrong_bytes_are_never_kept(tmp_path: Path) -> None:
    store = _store(tmp_path)
    with pytest.raises(DigestError):
        store.put_blob("0" * 64, b"anything")
    assert list(Layout(tmp_path).artifacts.iterdir()) == []


def test_local_chunks_are_taken_only_when_they_still_hash_right(tmp_path: Path) -> None:
    store, content = _store(tmp_path), _content()
    chunk_map = make_chunk_map(content, "raw")
    encoded = encode_chunk_map(chunk_map)
    store.put_blob(chunk_map.artifact_sha256, content)
    store.put_blob(sha256_hex(encoded), encoded)
    local = LocalChunks(store, [(chunk_map.artifact_sha256, sha256_hex(encoded))])
    offset, piece = _chunk(content, chunk_map, 1)
    assert local.get(chunk_map.chunks[1].sha256) == piece
    assert local.get("1" * 64) is None
    with store.path(chunk_map.artifact_sha256).open("r+b") as file:
        file.seek(offset)
        file.write(bytes([piece[0] ^ 1]))
    assert local.get(chunk_map.chunks[1].sha256) is None


def test_no_document_can_name_a_path(tmp_path: Path) -> None:
    with pytest.raises(BugError):
        _store(tmp_path).has("../../etc/passwd")


def test_garbage_is_what_no_slot_needs(tmp_path: Path) -> None:
    store = _store(tmp_path)
    kept, dropped = sha256_hex(b"kept"), sha256_hex(b"dropped")
    store.put_blob(kept, b"kept")
    store.put_blob(dropped, b"dropped")
    assert store.collect_garbage({kept}) == len(b"dropped")
    assert store.has(kept) and not store.has(dropped)


_FULL_DISK = """
import resource, sys
from pathlib import Path
from slmops.agent.store.artifacts import ArtifactStore
from slmops.agent.store.journal import Journal, read_journal, write_journal
from slmops.agent.store.layout import Layout
from slmops.artifact.chunkmap import make_chunk_map
from slmops.core.device.machine import DeviceState
from slmops.core.errors import NoSpaceError
import random, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
layout = Layout(Path(sys.argv[1])); layout.make()
write_journal(layout.journal, Journal(1, DeviceState(generation=7)))
content = random.Random(0).randbytes(3_000_000)
chunk_map = make_chunk_map(content, "raw")
assembly = ArtifactStore(layout).assembly(chunk_map)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
refused = 0
for index, offset, _, size in list(assembly.missing()):
    try:
        assembly.write(index, offset, content[offset : offset + size])
    except NoSpaceError:
        refused += 1
assert refused > 0, "the disk was not full"
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 1_000_000))
try:
    write_journal(layout.journal, Journal(1, DeviceState(generation=8)))
    raise SystemExit("the journal was written to a full disk")
except NoSpaceError as error:
    assert "no space" in error.message
assert read_journal(layout.journal).state.generation == 7
assert not [p for p in layout.root.iterdir() if p.name.endswith(".tmp")]
"""


def test_a_full_disk_is_a_named_error_and_loses_nothing(tmp_path: Path) -> None:
    """The file-size limit stands for the full disk: the same write fails half way, on any file system, without root."""
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stderr
