"""How pieces of an answer get from the scheduler to the thread that writes them."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("tokenizers")
from slmops.runtimes.token_loop.scheduler import End, Piece, Ticket


def test_pieces_of_a_whole_answer_come_with_its_end() -> None:
    ticket = Ticket(live=False)
    ticket.tell(Piece("a"))
    assert ticket.events.empty()
    assert not ticket.wait_delivered(time.monotonic() + 1.0)  # nobody waits for it: nothing to write
    ticket.tell(End("stop", 1, 0, 1, 0.0, 0.0))
    assert [type(ticket.events.get_nowait()) for _ in range(2)] == [Piece, End]


def test_a_streamed_piece_is_waited_for_until_it_is_written_and_no_longer_than_allowed() -> None:
    ticket = Ticket(live=True)
    ticket.tell(Piece("a"))
    began_s = time.monotonic()
    assert ticket.wait_delivered(began_s + 0.05)  # nobody took it
    assert time.monotonic() - began_s >= 0.05
    ticket.delivered()
    assert not ticket.wait_delivered(time.monotonic() + 60.0)
