"""A control plane for device tests: real HTTP on loopback, with orders and faults set by the test.

It does no more than the device can see: it takes reports, gives assignments, serves metadata and chunks. Faults act on
the routes that a network or a liar can spoil.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from types import TracebackType

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from slmops.protocol.messages import (
    PROTOCOL_HEADER,
    SCHEMA,
    TIME_HEADER,
    Assignment,
    CheckinRequest,
    CheckinResponse,
    EnrollRequest,
    EnrollResponse,
    Problem,
    decode,
    encode,
)
from slmops.testing.releases import SignedReleases

TOKEN = "test-token"


@dataclass
class Faults:
    """What goes wrong. Every field may be changed while the server runs.

    Attributes:
        down: check-ins and downloads answer 503.
        flip_chunks: chunks (not documents below 64 KiB) are served with one bit flipped; counts down.
        truncate_chunks: chunks are cut in half; counts down.
        refuse_chunks: chunk requests answer 503; counts down.
        endless_chunks: chunks are followed by more bytes for ever; counts down.
        clock_offset_s: the server's clock is this far from ours.
        delay_chunk_s: pause before each chunk.
    """

    down: bool = False
    flip_chunks: int = 0
    truncate_chunks: int = 0
    refuse_chunks: int = 0
    endless_chunks: int = 0
    clock_offset_s: float = 0.0
    delay_chunk_s: float = 0.0


@dataclass
class FakeControlPlane:
    """Use as a context; ``url`` is set inside. ``check_seq`` refuses check-ins whose number does not grow, and counts them."""

    releases: SignedReleases
    poll_s: float = 0.1
    faults: Faults = field(default_factory=Faults)
    assignment: Assignment | None = None
    reports: deque[CheckinRequest] = field(default_factory=lambda: deque(maxlen=5000))
    fetched: Counter[str] = field(default_factory=Counter)
    url: str = ""
    port: int = 0
    check_seq: bool = False
    refused_seqs: int = 0

    def __post_init__(self) -> None:
        """No check-in was accepted yet."""
        self._accepted_seq = 0

    def __enter__(self) -> FakeControlPlane:
        """Listen on a free loopback port (or the one given) in a thread."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", self.port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self._app(), log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[self._socket])), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()

    # ---- what a test reads ---------------------------------------------------------------------------------------------

    @property
    def last(self) -> CheckinRequest | None:
        """The last report."""
        return self.reports[-1] if self.reports else None

    def phases(self) -> list[str]:
        """Reported phases in order, without repeats."""
        seen: list[str] = []
        for report in list(self.reports):
            if not seen or seen[-1] != report.phase:
                seen.append(report.phase)
        return seen

    def wait_for(self, done: Callable[[FakeControlPlane], bool], timeout_s: float = 60.0) -> None:
        """Wait until a condition on the reports holds.

        Raises:
            AssertionError: it did not in time; says what was reported.
        """
        wake = threading.Event()
        end = datetime.now(timezone.utc) + timedelta(seconds=timeout_s)
        while datetime.now(timezone.utc) < end:
            if done(self):
                return
            wake.wait(0.05)
        raise AssertionError(f"not within {timeout_s} s; phases {self.phases()}, last report {self.last}")

    # ---- routes --------------------------------------------------------------------------------------------------------

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/enroll", self._enroll, methods=["POST"]),
                Route("/v1/checkin", self._checkin, methods=["POST"]),
                Route("/v1/tuf/{name}", self._tuf),
                Route("/v1/chunks/sha256/{digest}", self._chunk),
            ]
        )

    def _answer(self, content: bytes, status: int = 200) -> Response:
        now = datetime.now(timezone.utc) + timedelta(seconds=self.faults.clock_offset_s)
        return Response(content, status, {TIME_HEADER: now.isoformat(), PROTOCOL_HEADER: str(SCHEMA)})

    def _problem(self, status: int, code: str, detail: str) -> Response:
        return self._answer(
            encode(Problem("about:blank", code, status, detail, code, "this is a test")), status
        )

    async def _enroll(self, request: Request) -> Response:
        message = decode(await request.body(), EnrollRequest)
        if message.token != TOKEN:
            return self._problem(401, "auth.token", "enrolment token is unknown")
        return self._answer(
            encode(EnrollResponse(SCHEMA, message.name, self.releases.root.decode(), self.poll_s))
        )

    async def _checkin(self, request: Request) -> Response:
        if self.faults.down:
            return self._problem(503, "transient", "down on purpose")
        message = decode(await request.body(), CheckinRequest)
        if self.check_seq and message.seq <= self._accepted_seq:
            self.refused_seqs += 1
            problem = Problem(
                "about:blank",
                "usage.conflict",
                409,
                "a replay",
                "usage.conflict",
                "",
                {"accepted_seq": self._accepted_seq},
            )
            return self._answer(encode(problem), 409)
        self._accepted_seq = message.seq
        self.reports.append(message)
        wanted = self.assignment
        if wanted is not None and wanted.generation > message.generation:
            return self._answer(encode(CheckinResponse(SCHEMA, message.seq, self.poll_s, wanted)))
        response = self._answer(b"", 204)
        response.headers["Retry-After"] = str(self.poll_s)
        return response

    async def _tuf(self, request: Request) -> Response:
        if self.faults.down:
            return self._problem(503, "transient", "down on purpose")
        content = self.releases.tuf.get(request.path_params["name"])
        return (
            self._answer(content)
            if content is not None
            else self._problem(404, "usage.not_found", "no such file")
        )

    async def _chunk(self, request: Request) -> Response:
        digest = request.path_params["digest"]
        content = self.releases.blobs.get(digest)
        if self.faults.down or content is None:
            return self._problem(404 if content is None else 503, "transient", "not here")
        if self.faults.delay_chunk_s:
            await asyncio.sleep(self.faults.delay_chunk_s)
        if self._take("refuse_chunks"):
            return self._problem(503, "transient", "refused on purpose")
        self.fetched[digest] += 1
        if self._take("flip_chunks"):
            content = bytes([content[0] ^ 1]) + content[1:]
        elif self._take("truncate_chunks"):
            content = content[: len(content) // 2]
        elif self._take("endless_chunks"):
            content += b"\0" * (1 << 20)
        return self._answer(content)

    def _take(self, fault: str) -> bool:
        left = getattr(self.faults, fault)
        if left > 0:
            setattr(self.faults, fault, left - 1)
        return bool(left > 0)
