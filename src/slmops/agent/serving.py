"""Which engine answers: routing requests to the active backend, swapping it without failing one, keeping it alive.

* :class:`Backend` is one engine with the release behind it and the number of requests inside it.
* :class:`Router` gives requests a backend. A blue/green swap points new requests at the new backend and waits until
  the old one is empty. A cold swap (RAM for one model only) holds new requests in a queue meanwhile.
* :class:`EngineKeeper` starts engines for slots, restarts the active one when it dies and counts crashes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from slmops.agent.facts import memory_limit_bytes
from slmops.agent.hangs import HangWatch
from slmops.agent.identity import DeviceConfig
from slmops.agent.store.artifacts import ArtifactStore
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import Slot, SlotArtifact, read_slot
from slmops.agent.store.views import make_view
from slmops.artifact.manifest import Variant, decode
from slmops.core.device.fit import Serving, memory_needed
from slmops.core.device.machine import SlotName
from slmops.core.errors import BusyError, DigestError, RuntimeLoadError, SlmopsError, TrustError
from slmops.protocol.messages import ServingSettings
from slmops.runtimes import Capabilities, Engine, EngineLimits, EngineSpec, load
from slmops.runtimes.connect import engine_client

#: longest that a request waits for a backend (cold swap, restart of a dead engine), seconds
QUEUE_TIMEOUT_S = 120.0
#: longest that a swap waits for the old engine's requests, seconds
DRAIN_TIMEOUT_S = 300.0
LOAD_TIMEOUT_S = 120.0
_WATCH_EVERY_S = 0.25
_RESTART_PAUSES_S = (0.0, 0.5, 2.0, 5.0, 15.0, 30.0)


@dataclass(eq=False)
class Backend:
    """A running engine and what it serves; ``memory_bytes`` is what it needs by the fit's arithmetic."""

    name: SlotName
    slot: Slot
    engine: Engine
    capabilities: Capabilities
    client: httpx.AsyncClient
    system_prompt: str
    memory_bytes: int = 0
    in_flight: int = 0
    failed: int = 0
    empty: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        """Never more requests inside the engine than it has connection threads for: the others wait here."""
        self.room = asyncio.Semaphore(self.engine.spec.max_requests)

    @property
    def release(self) -> str:
        """``model@version`` and the release's short digest, for ``X-Slmops-Release``."""
        assignment = self.slot.assignment
        return f"{self.slot.model_name}@{assignment.version}+{assignment.release_sha256[:12]}"


class Router:
    """Hands requests to the active backend; one per device."""

    def __init__(self) -> None:
        """Nothing serves yet: requests wait."""
        self._active: Backend | None = None
        self._changed = asyncio.Condition()
        self._fallback = ""
        self._held = False

    @property
    def active(self) -> Backend | None:
        """The backend that new requests get."""
        return self._active

    @property
    def fallback(self) -> str:
        """Why there is no model at all; empty while there is, or may soon be, one."""
        return self._fallback

    @asynccontextmanager
    async def borrow(self, avoid: Backend | None = None) -> AsyncIterator[Backend]:
        """A backend for one request; waits while there is none.

        Args:
            avoid: a backend whose engine just failed: wait for another one, or for its restart.

        Raises:
            BusyError: none became available in time, or the device has no model.
        """
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._ready(avoid)), QUEUE_TIMEOUT_S)
            except asyncio.TimeoutError as error:
                raise BusyError(
                    "no model became ready in time",
                    hint="see /health for what the device is doing",
                    retry_after_s=5,
                ) from error
            backend = self._active
            if backend is None:
                raise BusyError(
                    self._fallback or "this device has no model", hint="assign a release to this device"
                )
            backend.in_flight += 1
            backend.empty.clear()
        try:
            async with backend.room:
                yield backend
        finally:
            backend.in_flight -= 1
            if backend.in_flight == 0:
                backend.empty.set()

    def _ready(self, avoid: Backend | None) -> bool:
        if self._fallback:
            return True
        return (
            not self._held
            and self._active is not None
            and self._active is not avoid
            and self._active.engine.alive()
        )

    async def point_to(self, backend: Backend | None) -> Backend | None:
        """Send new requests to a backend; returns the one before it."""
        async with self._changed:
            before, self._active = self._active, backend
            self._held = False
            if backend is not None:
                self._fallback = ""
            self._changed.notify_all()
            return before

    async def hold(self) -> None:
        """Queue new requests (cold swap)."""
        async with self._changed:
            self._held = True

    async def wake(self) -> None:
        """Look again: an engine came back."""
        async with self._changed:
            self._changed.notify_all()

    async def give_up(self, reason: str) -> None:
        """There is nothing to serve: answer so at once."""
        async with self._changed:
            self._active, self._fallback, self._held = None, reason, False
            self._changed.notify_all()

    @staticmethod
    async def drain(backend: Backend, timeout_s: float = DRAIN_TIMEOUT_S) -> bool:
        """Wait until a backend has no request inside; False when it took too long."""
        if backend.in_flight == 0:
            return True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(backend.empty.wait(), timeout_s)
        return backend.in_flight == 0


class EngineKeeper:
    """Starts, watches and stops the engines of the two slots."""

    def __init__(self, layout: Layout, store: ArtifactStore, config: DeviceConfig, router: Router) -> None:
        """Keep engines for one device."""
        self._layout = layout
        self._store = store
        self._config = config
        self._router = router
        self._running: dict[SlotName, Backend] = {}
        self._starting = asyncio.Lock()
        self.restarts = 0
        self.hangs = 0
        #: called with a slot's name when its engine died by itself
        self.on_death: Callable[[SlotName], None] = lambda name: None
        #: called when it cannot be started again because a file of its slot is damaged
        self.on_damage: Callable[[SlotName, DigestError], None] = lambda name, error: None

    def get(self, name: SlotName) -> Backend | None:
        """The slot's backend if its engine is alive."""
        backend = self._running.get(name)
        return backend if backend is not None and backend.engine.alive() else None

    def running(self) -> list[Backend]:
        """Every engine that was started and not stopped."""
        return list(self._running.values())

    def uses(self, sha256: str) -> bool:
        """Whether an engine has this file mapped: it must not be written to then."""
        return any(
            backend.engine.alive() and sha256 in (a.sha256 for a in backend.slot.artifacts)
            for backend in self._running.values()
        )

    def memory_bytes(self, name: SlotName) -> int:
        """Memory that a slot's engine needs, by the fit's arithmetic; 0 when that cannot be told (blocking)."""
        backend = self.get(name)
        if backend is not None:
            return backend.memory_bytes or backend.engine.rss_bytes()
        slot = read_slot(self._layout, name)
        return self._needs(slot)[0] if slot is not None else 0

    def _needs(self, slot: Slot) -> tuple[int, int]:
        """Memory needed and size of the weights; zeros when the variant's document is damaged: it serves without."""
        try:
            variant = decode(self._store.read_blob(slot.digest_of("variant")), Variant)
        except TrustError:
            return 0, 0
        shape = variant.model_shape()
        serving = fit_serving(slot.assignment.serving)
        return memory_needed(shape, serving, slot.runtime).total_bytes, shape.weights_bytes

    async def start(self, name: SlotName) -> Backend:
        """The slot's engine, started if need be and ready to answer. What it serves from is hashed before.

        Raises:
            DigestError: a file of the slot is damaged.
            RuntimeLoadError: the slot is empty, or the engine refuses its file.
        """
        async with self._starting:
            if (backend := self.get(name)) is not None:
                return backend
            slot = read_slot(self._layout, name)
            if slot is None:
                raise RuntimeLoadError(f"slot {name} is empty", hint="let the control plane assign a release")
            await asyncio.to_thread(require_whole, self._store, slot)
            await self._stop_running(name)
            backend = await self._launch(name, slot)
            self._running[name] = backend
            return backend

    async def _launch(self, name: SlotName, slot: Slot) -> Backend:
        serving = slot.assignment.serving
        if serving is None:
            raise RuntimeLoadError(
                f"slot {name} has no serving settings", hint="let the control plane assign the release again"
            )
        runtime = load(slot.runtime)
        memory, weights = await asyncio.to_thread(self._needs, slot)
        # The copy in this CPU's fastest order costs up to the weights' size in private memory, which the fit does not
        # count: it is made only where two engines with their copies fit.
        room = self._config.ram_limit_bytes or memory_limit_bytes()
        repack = memory > 0 and 2 * (memory + weights) <= room
        spec = EngineSpec(
            runtime=runtime.name,
            model_path=await asyncio.to_thread(make_view, self._layout, name, slot),
            context_tokens=serving.context_tokens,
            slots=serving.parallel,
            kv_cache=runtime.capabilities.kv_cache_for(serving.kv_cache),
            threads=self._config.threads,
            batch_tokens=max(serving.micro_batch_tokens, 64),
            ubatch_tokens=serving.micro_batch_tokens,
            embeddings=runtime.capabilities.embeddings_with_chat,
            repack=repack,
            model_alias=slot.model_name,
        )
        workdir = self._layout.engines / name
        _empty_folder(workdir)
        limits = EngineLimits(memory_bytes=self._config.ram_limit_bytes, cpu_cores=self._config.cpu_cores)
        engine = await runtime.start(spec, workdir, limits)
        try:
            await engine.wait_ready(timeout_s=LOAD_TIMEOUT_S)
        except BaseException:
            await engine.stop(grace_s=0.5)
            raise
        client = engine_client(engine.socket_path)
        prompt = self._system_prompt(slot)
        return Backend(name, slot, engine, runtime.capabilities, client, prompt, memory)

    def _system_prompt(self, slot: Slot) -> str:
        wanted = slot.assignment.serving.system_prompt if slot.assignment.serving else ""
        return self._store.read_blob(slot.digest_of(f"prompt:{wanted}")).decode() if wanted else ""

    async def stop(self, name: SlotName) -> None:
        """Stop the slot's engine; safe when there is none."""
        async with self._starting:
            await self._stop_running(name)

    async def _stop_running(self, name: SlotName) -> None:
        backend = self._running.pop(name, None)
        if backend is not None:
            await backend.client.aclose()
            await backend.engine.stop()

    async def stop_all(self) -> None:
        """Stop every engine."""
        for name in list(self._running):
            await self.stop(name)

    async def watch(self) -> None:
        """Restart the active engine whenever it dies or hangs, for ever; pauses grow while it keeps dying."""
        failures = 0
        hangs = HangWatch()
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            for name, backend in list(self._running.items()):
                if backend.engine.alive():
                    if not hangs.seen(backend.engine):
                        continue
                    self.hangs += 1
                    await backend.engine.stop(grace_s=0.0)  # its requests fail over, as after a crash
                self.on_death(name)
                if self._router.active is not backend:
                    self._running.pop(name, None)
                    continue
                self.restarts += 1
                await asyncio.sleep(_RESTART_PAUSES_S[min(failures, len(_RESTART_PAUSES_S) - 1)])
                if self._running.get(name) is not backend or self._router.active is not backend:
                    continue  # a revert was faster
                try:
                    fresh = await self.start(name)
                except DigestError as error:
                    failures += 1
                    self.on_damage(name, error)
                    continue
                except (SlmopsError, OSError):
                    failures += 1
                    continue
                failures = 0
                await self._router.point_to(fresh)


def fit_serving(serving: ServingSettings | None) -> Serving:
    """Serving settings as the fit wants them."""
    if serving is None:
        return Serving()
    return Serving(serving.context_tokens, serving.kv_cache, serving.parallel, serving.micro_batch_tokens)


_SERVED_FROM = ("model", "part", "prompt", "adapter")


def _needed_to_serve(slot: Slot) -> tuple[SlotArtifact, ...]:
    """The files without which a slot does not answer as its release; the others are fetched again when they are needed."""
    return tuple(a for a in slot.artifacts if a.role.split(":", 1)[0] in _SERVED_FROM)


def require_whole(store: ArtifactStore, slot: Slot) -> None:
    """Hash again what a slot serves from (blocking; some 0.1 s for each 100 MB).

    Raises:
        DigestError: names the file that is damaged or gone.
    """
    for artifact in _needed_to_serve(slot):
        if not store.is_whole(artifact.sha256):
            raise DigestError(
                f"{artifact.path or artifact.role} of {slot.model_name}@{slot.assignment.version} is damaged on disk: "
                f"it does not hash to {artifact.sha256[:12]}",
                hint="it is fetched again by itself as soon as the control plane is reached",
            )


def _empty_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            path.unlink()
