"""The composition root: options in, a running control plane out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.metadata
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import structlog
import uvicorn
from starlette.types import ASGIApp

from slmops.core.errors import BusyError, UsageError
from slmops.server.adapters.chunk_directory import ChunkDirectory
from slmops.server.adapters.database import SqlStore
from slmops.server.adapters.folder import ONLINE_KEY, FolderLock, open_folder
from slmops.server.adapters.group_commit import LINGER_S, GroupCommit
from slmops.server.adapters.metadata_directory import MetadataDirectory
from slmops.server.adapters.online_key import load_online_key
from slmops.server.adapters.system import RandomNames, SystemClock
from slmops.server.api.app import create_app
from slmops.server.api.event_routes import EventHub
from slmops.server.api.metrics import Metrics
from slmops.server.ports.world import Clock, Names
from slmops.server.services.access import Access
from slmops.server.services.blueprints import Blueprints
from slmops.server.services.catalogue import Catalogue
from slmops.server.services.checkins import Checkins
from slmops.server.services.control_plane import Services
from slmops.server.services.device_auth import DeviceTokens
from slmops.server.services.fleet import Fleet
from slmops.server.services.publication import Publication
from slmops.server.services.registry import Registry
from slmops.server.services.rollout_views import RolloutViews
from slmops.server.services.rollouts import Rollouts
from slmops.server.web.pages import create_pages, install_page_errors
from slmops.server.worker.loop import Worker

#: connections that may wait to be accepted: a fleet that comes back after an outage comes all at once
BACKLOG = 4096
#: how long requests that are under way may take when the server stops, seconds
STOP_S = 5
LOG_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

log = structlog.get_logger("slmops.server")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a control plane runs.

    Attributes:
        host: address to listen on; loopback unless said otherwise.
        port: 0 takes a free one.
        data_dir: database, chunks, signed metadata and online key; private to this user.
        database_url: SQLAlchemy URL; None for SQLite in the data folder.
        tick_s: pause between the rollout worker's turns, seconds.
        poll_s: how often devices should check in, seconds.
        linger_s: how long a lone check-in waits to share its flush with others, seconds.
        tls_cert: PEM chain; with ``tls_key`` the server speaks TLS itself.
        reserve_bytes: disk that uploads must leave free.
        log_level: of the JSON log on stderr.
    """

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8420
    database_url: str | None = None
    tick_s: float = 1.0
    poll_s: float = 30.0
    linger_s: float = LINGER_S
    tls_cert: Path | None = None
    tls_key: Path | None = None
    reserve_bytes: int = 64 << 20
    log_level: str = "info"


@dataclass(slots=True)
class Application:
    """A control plane without a socket: services, HTTP surface and worker.

    Use as a context: the folder's lock, the database and the threads are let go of at its end.
    """

    services: Services
    asgi: ASGIApp
    worker: Worker
    hub: EventHub
    _journal: GroupCommit
    _lock: FolderLock
    _closed: bool = field(default=False)

    def __enter__(self) -> Application:
        """Already open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Stop the worker, write what has arrived, close the database; repeating it is safe."""
        if self._closed:
            return
        self._closed = True
        self.hub.close()
        self.worker.close()
        self._journal.close()
        self.services.store.close()
        self._lock.release()


def open_application(
    options: ServerOptions, *, clock: Clock | None = None, names: Names | None = None
) -> Application:
    """Put a control plane together; its worker is not started yet.

    Args:
        options: how it runs.
        clock: the machine's, unless a test brings its own.
        names: the system's chance, unless a test brings its own.

    Raises:
        NotFoundError: the data folder has no keys and root yet.
        BusyError: another server runs on this folder.
        UsageError: the folder or the database URL cannot be used.
    """
    folder = open_folder(options.data_dir)
    lock = FolderLock(folder)
    try:
        clock, names = clock or SystemClock(), names or RandomNames()
        online = load_online_key(folder / ONLINE_KEY)
        publication = Publication(MetadataDirectory(folder / "tuf"), online, clock)
        store = _open_store(options, folder)
        chunks = ChunkDirectory(folder / "chunks", options.reserve_bytes)
        hub = EventHub()
        metrics = Metrics(store)
        registry = Registry(store)
        journal = GroupCommit(store, metrics.batches.observe, options.linger_s)
        catalogue = Catalogue(store, chunks, publication, clock, hub)
        rollouts = Rollouts(store, catalogue, registry, clock, names, hub)
        services = Services(
            store=store,
            chunks=chunks,
            clock=clock,
            access=Access(store, clock, names),
            registry=registry,
            device_tokens=DeviceTokens(registry),
            checkins=Checkins(registry, journal, clock, names, options.poll_s),
            publication=publication,
            catalogue=catalogue,
            fleet=Fleet(store, catalogue, registry, clock, hub, options.poll_s),
            blueprints=Blueprints(store, catalogue, rollouts, clock, hub),
            rollouts=rollouts,
            rollout_views=RolloutViews(store, rollouts, clock),
            poll_s=options.poll_s,
        )

        def observe_tick(took_s: float, well: bool) -> None:
            metrics.tick_s.observe(took_s)
            if not well:
                metrics.tick_failures.inc()

        worker = Worker(rollouts, publication, clock, options.tick_s, observe_tick)
        asgi = create_app(
            services,
            metrics,
            hub,
            worker.alive,
            importlib.metadata.version("slmops"),
            create_pages(services, secure=options.tls_cert is not None),
            install_page_errors,
        )
        return Application(services, asgi, worker, hub, journal, lock)
    except BaseException:
        lock.release()
        raise


def run_server(options: ServerOptions, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Run a control plane until it is told to stop (SIGINT, SIGTERM).

    Args:
        options: how it runs.
        on_ready: called with the server's URL once it accepts connections.

    Raises:
        BusyError: the port is taken, or another server runs on the data folder.
        NotFoundError: the data folder has no keys and root yet.
    """
    configure_logging(options.log_level)
    listener = listen(options.host, options.port)
    with listener, open_application(options) as application:
        server = HttpServer(application, options)
        url = url_of(listener, tls=options.tls_cert is not None)

        def ready() -> None:
            log.info("server.listening", url=url, data_dir=str(options.data_dir))
            if on_ready is not None:
                on_ready(url)

        server.on_started = ready
        application.worker.start()
        server.run(sockets=[listener])
        log.info("server.stopped")


class HttpServer(uvicorn.Server):
    """uvicorn, with our socket, and with event streams that end when the server stops."""

    def __init__(self, application: Application, options: ServerOptions) -> None:
        """Configure uvicorn; ``on_started`` may be set before it runs."""
        if (options.tls_cert is None) != (options.tls_key is None):
            raise UsageError("TLS needs both a certificate and a key", hint="give --tls-cert and --tls-key")
        self._application = application
        self.on_started: Callable[[], None] | None = None
        super().__init__(
            uvicorn.Config(
                application.asgi,
                log_config=None,
                access_log=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=STOP_S,
                timeout_keep_alive=75,
                server_header=False,
                ssl_certfile=None if options.tls_cert is None else str(options.tls_cert),
                ssl_keyfile=None if options.tls_key is None else str(options.tls_key),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM, and then go on: uvicorn would raise them again before our own goodbye."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, then say so."""
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the event streams first: they would hold the server up for ever."""
        self._application.hub.close()
        await asyncio.sleep(0)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        BusyError: the port is taken.
        UsageError: the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # the protocol is named because asyncio switches Nagle's algorithm off only then
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"port {port} on {host} is taken by another program",
                hint="stop that program, or choose another port: slmops server run --listen HOST:PORT (0 takes a free one)",
                port=port,
            ) from error
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint="use an address of this machine, for example 127.0.0.1",
        ) from error
    return listener


def url_of(listener: socket.socket, *, tls: bool) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{port}"


def create_operator_token(options: ServerOptions, role: str, name: str, ttl_s: int | None = None) -> str:
    """Make an operator token, straight in the database; a running server knows it at once.

    Args:
        options: for the data folder and database.
        role: viewer, operator, approver or admin.
        name: who holds it; shows up in the audit trail.
        ttl_s: how long it is good for, seconds; None for ever.

    Raises:
        UsageError: role, name or time are not valid.
        ConflictError: the name is taken.
    """
    folder = open_folder(options.data_dir)
    store = _open_store(options, folder)
    try:
        access = Access(store, SystemClock(), RandomNames())
        return access.create_operator_token("server-console", role, name, ttl_s)
    finally:
        store.close()


def _open_store(options: ServerOptions, folder: Path) -> SqlStore:
    if options.database_url is not None:
        return SqlStore(options.database_url)
    return SqlStore.in_folder(folder)


def configure_logging(level: str) -> None:
    """JSON lines on stderr, for our own log and for uvicorn's; no request bodies, no tokens, no keys."""
    number = LOG_LEVELS.get(level.lower())
    if number is None:
        raise UsageError(f"log level {level!r} is not known", hint="one of debug, info, warning, error")
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(max(number, logging.WARNING))
