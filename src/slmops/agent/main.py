"""The agent's composition root: one process, one event loop, everything wired here.

Order of a start: settings and journal, then the gateway (``/health`` answers from the first moment), then the engine of
what was proved, then whatever the journal says was under way. The control plane comes last: the device does not need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import random
import signal
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from slmops.agent.facts import read_facts, usable_runtimes, use_external_server
from slmops.agent.gateway.app import Gateway
from slmops.agent.gateway.measures import Measures
from slmops.agent.identity import SCHEMA, DeviceConfig, load_config, make_key, save_config
from slmops.agent.loop.actions import Actions
from slmops.agent.loop.driver import Driver, next_journal
from slmops.agent.release_source import ReleaseSource
from slmops.agent.reporting import Reporter
from slmops.agent.serving import EngineKeeper, Router
from slmops.agent.store.artifacts import ArtifactStore
from slmops.agent.store.files import write_atomic
from slmops.agent.store.journal import read_journal, write_journal
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import read_pointer
from slmops.agent.transport import HttpControlPlane
from slmops.core.device.machine import Booted, Command, Phase, RevertOrdered, step
from slmops.core.errors import BusyError, NoSpaceError
from slmops.protocol.messages import SCHEMA as MESSAGE_SCHEMA
from slmops.protocol.messages import EnrollRequest
from slmops.runtimes.external.config import read_config

log = logging.getLogger("slmops.agent")

_SHUTDOWN_S = 10


@dataclass(frozen=True, slots=True)
class EnrollOptions:
    """What ``slmops agent enroll`` is given; see ``DeviceConfig`` for most of it.

    ``external`` is a file that describes the owner's own server (runtime `external`); it is copied into the folder.
    """

    directory: Path
    server_url: str
    token: str
    name: str
    profile: str
    labels: dict[str, str]
    gateway_host: str = "127.0.0.1"
    gateway_port: int = 8421
    ram_limit_bytes: int | None = None
    cpu_cores: float | None = None
    threads: int = 1
    extra_runtime: str = ""
    runtimes: tuple[str, ...] = ()
    external: Path | None = None


def enroll(options: EnrollOptions) -> DeviceConfig:
    """Make a key, exchange the token for an identity, pin the TUF root.

    Raises:
        TokenError: the token is expired, used up or unknown.
        ConflictError: the folder already holds a device.
        NetworkError: the control plane cannot be reached; nothing but the key was written, and it is used again.
        UsageError, RuntimeLoadError: what ``external`` describes cannot be used.
    """
    layout = Layout(options.directory)
    if options.external is not None:
        read_config(options.external).program()
    layout.make()
    if options.external is not None:
        write_atomic(layout.external, options.external.read_bytes(), mode=0o600)
    use_external_server(layout)
    public_key = make_key(layout)
    config = DeviceConfig(
        schema=SCHEMA,
        device_id=options.name,
        server_url=options.server_url,
        profile=options.profile,
        tuf_root="",
        labels=options.labels,
        gateway_host=options.gateway_host,
        gateway_port=options.gateway_port,
        ram_limit_bytes=options.ram_limit_bytes,
        cpu_cores=options.cpu_cores,
        threads=options.threads,
        extra_runtime=options.extra_runtime,
        runtimes=options.runtimes,
    )
    request = EnrollRequest(
        MESSAGE_SCHEMA,
        options.token,
        public_key,
        options.name,
        options.profile,
        read_facts(layout, config),
        options.labels,
    )

    async def exchange() -> DeviceConfig:
        server = HttpControlPlane(options.server_url)
        try:
            answer = await server.enroll(request)
        finally:
            await server.close()
        return msgspec.structs.replace(
            config, device_id=answer.device_id, tuf_root=answer.tuf_root, poll_s=answer.poll_s
        )

    enrolled = asyncio.run(exchange())
    save_config(layout, enrolled)
    return enrolled


def run_agent(directory: Path) -> None:
    """Run the agent until it is told to stop.

    Raises:
        NotFoundError: the folder holds no enrolled device.
        BusyError: another agent runs on this folder, or the gateway's port is taken.
    """
    layout = Layout(directory.resolve())
    config = load_config(layout)
    layout.make()
    use_external_server(layout)
    with _exclusive(layout), listening_socket(config) as listener:
        _log_to_stderr(config.device_id)
        asyncio.run(_Agent(layout, config, listener).run())


class _Agent:
    """Everything of one running device."""

    def __init__(self, layout: Layout, config: DeviceConfig, listener: socket.socket) -> None:
        self._layout, self._config, self._listener = layout, config, listener
        chance = random.Random()
        self._server = HttpControlPlane(
            config.server_url, device_id=config.device_id, key_pem=layout.key.read_bytes()
        )
        store = ArtifactStore(layout)
        source = ReleaseSource(
            self._server, store, layout.tuf, config.tuf_root.encode(), lambda: usable_runtimes(config)
        )
        self._router, self._measures = Router(), Measures()
        self._keeper = EngineKeeper(layout, store, config, self._router)
        self._actions = Actions(
            layout,
            config,
            store,
            self._server,
            source,
            self._keeper,
            self._router,
            self._server.clock,
            chance,
        )
        self._driver = Driver(layout, read_journal(layout.journal), self._actions.act)
        self._actions.driver = self._driver
        self._reporter = Reporter(
            layout,
            config,
            self._server,
            self._driver,
            self._actions,
            self._router,
            self._keeper,
            self._measures,
            uuid.uuid4().hex,
            chance,
        )

    async def run(self) -> None:
        gateway = Gateway(self._router, self._measures, self._status)
        http = uvicorn.Server(
            uvicorn.Config(
                gateway.app(),
                log_config=None,
                loop="asyncio",  # a device has neither uvloop nor httptools: be the same where they are installed
                http="h11",
                ws="none",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=_SHUTDOWN_S,
                server_header=False,
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[self._listener]))
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._order_revert)
        port = self._listener.getsockname()[1]
        run_file = self._layout.root / "run.json"
        where = {"pid": os.getpid(), "port": port, "url": f"http://{self._config.gateway_host}:{port}/v1"}
        try:
            write_atomic(run_file, msgspec.json.encode(where))
        except (
            NoSpaceError,
            OSError,
        ) as error:  # it only tells people where to look: a full disk must not stop serving
            with contextlib.suppress(OSError):
                run_file.unlink(missing_ok=True)  # the last agent's
            log.error("run.json could not be written: %s", error)
        log.info("serving on http://%s:%d/v1", self._config.gateway_host, port)
        if self._driver.state.phase is Phase.IDLE:
            log.info("no release yet: requests wait until one is assigned and proved")
        work = [asyncio.create_task(act) for act in (self._boot(), self._keeper.watch())]
        try:
            await asyncio.wait({serving, *work}, return_when=asyncio.FIRST_COMPLETED)
            for task in work:
                if task.done():
                    task.result()  # raises what ended it
        finally:
            http.should_exit = True
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await serving
            await self._keeper.stop_all()
            await self._server.close()
            run_file.unlink(missing_ok=True)

    async def _boot(self) -> None:
        await self._driver.feed(Booted(read_pointer(self._layout.pointer)))
        await asyncio.gather(self._driver.run(), self._reporter.run())

    def _order_revert(self) -> None:
        log.info("a revert was ordered at the device")
        self._order = asyncio.get_running_loop().create_task(self._driver.feed(RevertOrdered()))

    def _status(self) -> dict[str, Any]:
        state = self._driver.state
        self._measures.phase.clear()
        self._measures.phase.labels(state.phase.value).set(1)
        active = self._router.active
        described = {
            "device": self._config.device_id,
            "phase": state.phase.value,
            "control_plane": "reachable" if self._reporter.reachable else "unreachable",
        }
        if active is not None and state.phase is Phase.SAFE_FALLBACK and active.name != state.committed_slot:
            described["stands_in"] = "the committed release is damaged and being repaired"
        if self._router.fallback:
            described["why"] = self._router.fallback
        return described


@contextmanager
def _exclusive(layout: Layout) -> Iterator[None]:
    """One agent per folder: two would fight over the journal."""
    with os.fdopen(os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = lock.read(32).decode("ascii", "replace").strip() or "?"
            raise BusyError(
                f"another agent (process {holder}) runs on {layout.root}",
                hint="stop it first, or use another --dir",
            ) from error
        # Written over the last one's, in as many bytes: on a full disk there is room for no more.
        with contextlib.suppress(OSError):
            os.pwrite(lock.fileno(), f"{os.getpid():<15}\n".encode("ascii"), 0)
        yield


def running_pid(layout: Layout) -> int | None:
    """Process id of the agent that runs on a folder; None when none does."""
    with contextlib.suppress(FileNotFoundError), layout.lock.open("r+", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return int(lock.read().strip() or 0) or None
    return None


def order_revert_offline(layout: Layout) -> str:
    """Take the order to go back into the journal of a device whose agent is not running; its next start acts on it.

    Returns:
        What will happen, in words.
    """
    with _exclusive(layout):
        journal = read_journal(layout.journal)
        state, commands = step(journal.state, RevertOrdered())
        if state == journal.state:
            return "there is nothing to go back to: no previous release is kept on this device"
        write_journal(layout.journal, next_journal(journal, state, None))
    if Command.REVERT not in commands:
        return "noted: the update that was under way is refused; what the device has proved stays"
    return "noted: the agent goes back to the previous release when it starts"


@contextmanager
def listening_socket(config: DeviceConfig) -> Iterator[socket.socket]:
    """The gateway's listening socket, closed at the end.

    Raises:
        BusyError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in config.gateway_host else socket.AF_INET
    # With the protocol named: asyncio switches Nagle's algorithm off only then, and without that a client that asks again at
    # once waits 40 ms (its delayed acknowledgement) for the second part of our answer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.gateway_host, config.gateway_port))
            listener.listen(256)
        except OSError as error:
            raise BusyError(
                f"cannot listen on {config.gateway_host}:{config.gateway_port}: {error.strerror}",
                hint="stop what uses the port, or set gateway_port in device.json (0 picks a free one)",
                port=config.gateway_port,
            ) from error
        listener.setblocking(False)
        yield listener


class _JsonLines(logging.Formatter):
    """One JSON object a line; nothing of a prompt or an answer is ever passed to a logger."""

    def __init__(self, device_id: str) -> None:
        super().__init__()
        self._device_id = device_id

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {
            "time": moment,
            "level": record.levelname.lower(),
            "device": self._device_id,
            "logger": record.name,
            "event": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _log_to_stderr(device_id: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(device_id))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "uvicorn.error", "tuf", "securesystemslib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
