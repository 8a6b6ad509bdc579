"""Pieces that steps share: made once, never believed when damaged."""

from __future__ import annotations

from pathlib import Path

from slmops.build.memo import Memo

RUN = "slmops.build.steps.tensors:TensorQuantiser"


def test_a_piece_is_made_once(tmp_path: Path) -> None:
    """Another memo over the same folder finds it; other parts are another piece."""
    made: list[str] = []

    def make(name: str) -> bytes:
        made.append(name)
        return name.encode() * 10

    first, second = Memo(tmp_path, RUN), Memo(tmp_path, RUN)
    assert first.piece(lambda: make("a"), tensor="a", type="Q4_0") == b"a" * 10
    assert second.piece(lambda: make("a"), tensor="a", type="Q4_0") == b"a" * 10
    assert second.piece(lambda: make("b"), tensor="a", type="Q5_0") == b"b" * 10
    assert made == ["a", "b"]
    assert (first.made, first.found, second.made, second.found) == (1, 0, 1, 1)


def test_a_damaged_piece_is_made_again(tmp_path: Path) -> None:
    """One changed byte, or half a file: neither is used."""
    memo = Memo(tmp_path, RUN)
    memo.piece(lambda: b"right" * 100, tensor="a")
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    for damage in (path.read_bytes()[:-1], path.read_bytes()[:40] + b"!" + path.read_bytes()[41:]):
        path.write_bytes(damage)
        assert memo.piece(lambda: b"right" * 100, tensor="a") == b"right" * 100
    assert memo.made == 3


def test_without_a_folder_nothing_is_kept() -> None:
    """A machine without a shared folder gives the same, later."""
    memo = Memo(None, RUN)
    assert [memo.piece(lambda: b"x", tensor="a") for _ in range(2)] == [b"x", b"x"]
    assert memo.made == 2
