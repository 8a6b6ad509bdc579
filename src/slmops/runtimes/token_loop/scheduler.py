"""Whose turn it is: one thread makes every forward pass; requests take turns, a piece of a prompt or one token at a time.

Prompts are evaluated in pieces that begin at multiples of the piece length, and a kept KV cache is continued
only from such a border that a prompt's whole pieces reached. So a request meets the same arithmetic whether
its beginning was cached or not: temperature 0 gives the same text always.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slmops.runtimes.token_loop.model import TokenModel, TokenSequence
from slmops.runtimes.token_loop.requests import Generation
from slmops.runtimes.token_loop.sampler import Sampler, best_of, log_softmax
from slmops.runtimes.token_loop.stops import StopFinder
from slmops.runtimes.token_loop.text import Text, Utf8Stream

#: After a token the loop waits this long at most until it was written to its client, so that a binding that keeps Python's
#: lock does not hold it back. Where nothing was to be written the loop sleeps as long: other requests need the lock, too.
_YIELD_S = 0.0002


@dataclass(frozen=True)
class TokenLogprob:
    """What ``logprobs`` says of one token: (id, log-probability), and the alternatives."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """Text that is surely part of the answer, with the tokens since the piece before."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class End:
    """The answer is complete.

    Attributes:
        reason: "stop" or "length".
        prompt_tokens, cached_tokens, answer_tokens: counts.
        prefill_s, decode_s: time of the forward passes and what belongs to them, by this request's clock.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Failure:
    """The forward pass or the grammar failed."""

    message: str


Event = Piece | End | Failure


class Ticket:
    """A request in the scheduler, from the side of the thread that answers it.

    Args:
        live: that thread wants every piece at once; else it is woken when the answer is complete.
    """

    def __init__(self, *, live: bool = False) -> None:
        self.events: queue.SimpleQueue[Event | dict[str, Any]] = queue.SimpleQueue()
        self.cancelled = False
        self._live = live
        self._held: list[Piece] = []
        self._undelivered = threading.Lock()  # locked while a piece is on its way

    def tell(self, event: Event | dict[str, Any]) -> None:
        """From the scheduler: something happened."""
        if isinstance(event, Piece) and not self._live:
            self._held.append(event)
            return
        for piece in self._held:
            self.events.put(piece)
        self._held = []
        if isinstance(event, Piece):
            self._undelivered.acquire(blocking=False)
        self.events.put(event)

    def delivered(self) -> None:
        """From the answering thread: what it took was written."""
        if self._undelivered.locked():
            self._undelivered.release()

    def wait_delivered(self, until_s: float) -> bool:
        """From the scheduler: give the answering thread time to write; tell whether there was something to write."""
        if not self._undelivered.locked():
            return False
        if self._undelivered.acquire(timeout=max(until_s - time.monotonic(), 0.0)):
            self._undelivered.release()
        return True

    def cancel(self) -> None:
        """Nobody reads on: stop at the next token."""
        self.cancelled = True


@dataclass(eq=False)
class _Seat:
    """A sequence of the model and what its cache holds.

    Attributes:
        ids: tokens evaluated.
        whole_tokens: of these, how many were evaluated as whole pieces of a prompt.
    """

    sequence: TokenSequence
    ids: list[int] = field(default_factory=list)
    whole_tokens: int = 0
    used_at_s: float = 0.0


class Scheduler:
    """Runs requests on one model.

    Args:
        model: loaded.
        text: its tokenizer.
        eos_tokens: ids that end an answer.
        context_tokens: most tokens of one sequence.
        slots: requests served at the same time.
        chunk_tokens: length of a prompt's pieces.
    """

    def __init__(
        self,
        model: TokenModel,
        text: Text,
        *,
        eos_tokens: tuple[int, ...],
        context_tokens: int,
        slots: int,
        chunk_tokens: int,
    ) -> None:
        self.model = model
        self.text = text
        self.eos_tokens = frozenset(eos_tokens)
        self.context_tokens = context_tokens
        self.slots = slots
        self.chunk_tokens = max(1, min(chunk_tokens, model.max_chunk_tokens))
        self.predicted_tokens = 0
        self.step_began_s: float | None = None
        self._waiting: deque[_Answer | _Scoring] = deque()
        self._scores: deque[_Scoring] = deque()
        self._changed = threading.Condition()
        self._idle: list[_Seat] = []
        self._made = 0

    def submit(self, generation: Generation) -> Ticket:
        """Queue an answer."""
        ticket = Ticket(live=generation.stream)
        self._enqueue(self._waiting, _Answer(self, generation, ticket))
        return ticket

    def score(self, token_ids: Sequence[int], start: int, top_k: int) -> Ticket:
        """Queue a score; its one event is the answer of ``/score``.

        It has a sequence of its own where the model can hold one more than there are slots, else it waits for a slot.
        """
        ticket = Ticket()
        alone = self.model.max_sequences is None or self.model.max_sequences > self.slots
        self._enqueue(
            self._scores if alone else self._waiting, _Scoring(self, list(token_ids), start, top_k, ticket)
        )
        return ticket

    def _enqueue(self, line: deque[Any], work: Any) -> None:
        with self._changed:
            line.append(work)
            self._changed.notify()

    def run(self) -> None:
        """Serve for ever, in the thread that may call the model."""
        active: list[_Answer | _Scoring] = []
        scoring: _Scoring | None = None
        while True:
            with self._changed:
                while not active and scoring is None and not self._waiting and not self._scores:
                    self._changed.wait()
                while self._waiting and len(active) < self.slots:
                    active.append(self._waiting.popleft())
                if scoring is None and self._scores:
                    scoring = self._scores.popleft()
            if scoring is not None and self._advance(scoring):
                scoring = None
                self._close_spare()
            stepped = list(active)
            for work in stepped:
                if self._advance(work):
                    active.remove(work)
            if stepped:
                until_s = time.monotonic() + _YIELD_S
                # a list, not a generator: each of them is to be given its time
                if not any([work.ticket.wait_delivered(until_s) for work in stepped]):
                    time.sleep(_YIELD_S)

    def _advance(self, work: _Answer | _Scoring) -> bool:
        """One step of one request; tell whether it is over."""
        self.step_began_s = time.monotonic()
        try:
            over = work.ticket.cancelled or work.step()
        except Exception as error:  # a binding's own exception: the request fails, the engine serves on
            print(
                f"error: {type(error).__name__} in a forward pass", flush=True
            )  # never a message: it may hold text
            work.ticket.tell(Failure(f"{type(error).__name__} in the runtime"))
            self._discard(work)
            return True
        finally:
            self.step_began_s = None
        if over:
            self._give_back(work)
        return over

    # --- sequences

    def seat(self, prompt: Sequence[int], reuse: bool) -> tuple[_Seat, int]:
        """A sequence for a prompt, and how many of its tokens are in its cache already."""
        best: _Seat | None = None
        kept = 0
        for seat in self._idle if reuse else ():
            common = self._reusable(seat, prompt)
            if best is None or common > kept:
                best, kept = seat, common
        if kept == 0:  # no cache to continue: overwrite the one that was not used for longest
            room = self.model.max_sequences is None or self._made < self.model.max_sequences
            if self._idle and (self._made >= self.slots or not room):
                best = min(self._idle, key=lambda seat: seat.used_at_s)
            else:
                best = _Seat(self.model.open_sequence())
                self._made += 1
        assert best is not None
        if best in self._idle:
            self._idle.remove(best)
            best.sequence.rewind(kept)
            del best.ids[kept:]
            best.whole_tokens = min(best.whole_tokens, kept)
        return best, kept

    def _reusable(self, seat: _Seat, prompt: Sequence[int]) -> int:
        most = min(seat.whole_tokens, len(prompt) - 1)
        common = 0
        while common < most and seat.ids[common] == prompt[common]:
            common += 1
        return common // self.chunk_tokens * self.chunk_tokens

    def _give_back(self, work: _Answer | _Scoring) -> None:
        if work.seat is not None:
            work.seat.used_at_s = time.monotonic()
            self._idle.append(work.seat)
            work.seat = None

    def _discard(self, work: _Answer | _Scoring) -> None:
        if work.seat is not None:
            work.seat.sequence.close()
            self._made -= 1
            work.seat = None

    def _close_spare(self) -> None:
        """A score's own sequence is not kept: it would cost a KV cache."""
        while self._made > self.slots and self._idle:
            seat = min(self._idle, key=lambda one: one.whole_tokens)
            self._idle.remove(seat)
            seat.sequence.close()
            self._made -= 1


class _Scoring:
    """Teacher-forced log-probabilities of one sequence."""

    def __init__(self, scheduler: Scheduler, ids: list[int], start: int, top_k: int, ticket: Ticket) -> None:
        self.ticket = ticket
        self.seat: _Seat | None = None
        self._scheduler = scheduler
        self._ids = ids
        self._start = start
        self._top_k = top_k
        self._done = 0
        self._answer: dict[str, Any] = {
            "start": start, "logprobs": [], "greedy_ids": [], "greedy_logprobs": [], "top": []
        }  # fmt: skip

    def step(self) -> bool:
        """One piece; the last token has nothing to predict."""
        if self.seat is None:
            self.seat, self._done = self._scheduler.seat(self._ids[: self._start], reuse=True)
        end = min(self._done + self._scheduler.chunk_tokens, len(self._ids) - 1)
        piece = self._ids[self._done : end]
        if end < self._start:
            self.seat.sequence.append(piece)
        else:
            rows = self.seat.sequence.append_all(piece)
            first = max(self._start - 1 - self._done, 0)
            self._read(rows[first:], self._ids[self._done + first + 1 : end + 1])
        self.seat.ids += piece
        if len(piece) == self._scheduler.chunk_tokens and end < self._start:
            self.seat.whole_tokens = end
        self._done = end
        if self._done < len(self._ids) - 1:
            return False
        self.ticket.tell(self._answer)
        return True

    def _read(self, rows: Any, targets: Sequence[int]) -> None:
        """Row by row: a whole piece in double precision would take a hundred megabytes."""
        for row, target in zip(rows, targets, strict=True):
            logprobs = log_softmax(row)
            best = int(np.argmax(row))
            self._answer["logprobs"].append(float(logprobs[target]))
            self._answer["greedy_ids"].append(best)
            self._answer["greedy_logprobs"].append(float(logprobs[best]))
            if self._top_k:
                self._answer["top"].append(best_of(logprobs, self._top_k))


class _Answer:
    """One answer under way."""

    def __init__(self, scheduler: Scheduler, wanted: Generation, ticket: Ticket) -> None:
        self.ticket = ticket
        self.seat: _Seat | None = None
        self._scheduler = scheduler
        self._wanted = wanted
        self._sampler = Sampler(wanted.sampling, wanted.prompt)
        self._stops = StopFinder(wanted.stops)
        self._bytes = Utf8Stream()
        room = scheduler.context_tokens - len(wanted.prompt)
        self._most = room if wanted.max_tokens is None else min(wanted.max_tokens, room)
        self._done = 0
        self._cached = 0
        self._answer_tokens = 0
        self._last: int | None = None
        self._pending: list[TokenLogprob] = []
        self._began_s = self._first_s = 0.0

    def step(self) -> bool:
        """A piece of the prompt, or one token."""
        wanted = self._wanted
        if self.seat is None:
            self._began_s = self._first_s = time.perf_counter()
            if self._most <= 0:
                return self._finish("length")
            self.seat, self._done = self._scheduler.seat(wanted.prompt, wanted.reuse)
            self._cached = self._done
        if self._last is not None:
            logits = self.seat.sequence.append([self._last])
            self.seat.ids.append(self._last)
            return self._token(logits)
        end = min(self._done + self._scheduler.chunk_tokens, len(wanted.prompt))
        piece = wanted.prompt[self._done : end]
        logits = self.seat.sequence.append(piece)
        self.seat.ids += piece
        if len(piece) == self._scheduler.chunk_tokens:
            self.seat.whole_tokens = end
        self._done = end
        if end < len(wanted.prompt):
            return False
        self._first_s = time.perf_counter()
        return self._token(logits)

    def _token(self, logits: Any) -> bool:
        """Choose, tell, and say whether that was the last."""
        wanted, scheduler = self._wanted, self._scheduler
        logprobs = log_softmax(logits) if wanted.logprobs is not None else None
        token = self._sampler.choose(logits, wanted.grammar.allowed() if wanted.grammar else None)
        complete = wanted.grammar is not None and wanted.grammar.accept(token)
        if token in scheduler.eos_tokens:
            return self._finish("stop")
        self._sampler.accept(token)
        self._answer_tokens += 1
        scheduler.predicted_tokens += 1
        self._last = token
        if logprobs is not None:
            top = best_of(logprobs, wanted.logprobs or 0)
            self._pending.append(TokenLogprob(token, float(logprobs[token]), top))
        raw = b"" if scheduler.text.is_control(token) else scheduler.text.bytes_of(token)
        self._say(self._stops.feed(self._bytes.feed(raw)))
        if self._stops.found or complete:
            return self._finish("stop")
        if self._answer_tokens >= self._most:
            return self._finish("length")
        return False

    def _say(self, text: str) -> None:
        if text:
            self.ticket.tell(Piece(text, tuple(self._pending)))
            self._pending = []

    def _finish(self, reason: str) -> bool:
        tail = self._stops.feed(self._bytes.end()) + self._stops.end()
        if tail or self._pending:
            self.ticket.tell(Piece(tail, tuple(self._pending)))
            self._pending = []
        self.ticket.tell(
            End(
                "stop" if self._stops.found else reason,
                len(self._wanted.prompt),
                self._cached,
                self._answer_tokens,
                self._first_s - self._began_s,
                time.perf_counter() - self._first_s,
            )
        )
        return True
