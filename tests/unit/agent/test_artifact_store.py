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


def test_a_file_damaged_later_is_removed_and_named(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.put_blob(sha256_hex(b"good"), b"good")
    store.path(sha256_hex(b"good")).write_bytes(b"evil")
    with pytest.raises(DigestError, match="removed"):
        store.verify(sha256_hex(b"good"))
    assert not store.has(sha256_hex(b"good"))


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
