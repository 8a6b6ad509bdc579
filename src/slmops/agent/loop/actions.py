"""What each command of the device machine does. Every one may be repeated after a kill, and finds its work half done."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time

import msgspec

from slmops.agent.facts import device_facts, profile_of, read_facts
from slmops.agent.golden import load_pack, run_probation_packs
from slmops.agent.identity import DeviceConfig
from slmops.agent.loop.driver import Driver
from slmops.agent.loop.fetching import DISK_MARGIN_BYTES, SLOTS, Fetching
from slmops.agent.loop.repairs import Repairs, why_lost
from slmops.agent.loop.windows import Windows
from slmops.agent.ports import Clock, ControlPlane
from slmops.agent.release_source import ReleaseSource, ResolvedRelease
from slmops.agent.retry import until_reached
from slmops.agent.serving import Backend, EngineKeeper, Router, fit_serving, require_whole
from slmops.agent.store.artifacts import ArtifactStore, Assembly
from slmops.agent.store.files import sync_folder, write_atomic
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import (
    Baseline,
    Slot,
    clear_slot,
    read_pointer,
    read_slot,
    write_pointer,
    write_slot,
)
from slmops.agent.store.views import remove_views
from slmops.core.device.fit import Fit, fit
from slmops.core.device.machine import (
    IN_TRIAL,
    Activated,
    Admitted,
    Command,
    Event,
    Failed,
    Failure,
    Fetched,
    Proved,
    Refused,
    Restored,
    SlotName,
    Unserved,
    Verified,
    WindowOpened,
)
from slmops.core.errors import BugError, DigestError, HealthCheckError, NoSpaceError, SlmopsError
from slmops.protocol.messages import Assignment, Bench
from slmops.runtimes.bench import bench_engine

log = logging.getLogger("slmops.agent")

#: tokens of the short bench that a candidate gets in probation
_BENCH_PROMPT_TOKENS, _BENCH_DECODE_TOKENS = 64, 24
_REVERT_ATTEMPTS = 3


class Actions:
    """Performs commands for one device."""

    def __init__(  # noqa: PLR0913 - the composition root hands in every part
        self,
        layout: Layout,
        config: DeviceConfig,
        store: ArtifactStore,
        server: ControlPlane,
        source: ReleaseSource,
        keeper: EngineKeeper,
        router: Router,
        clock: Clock,
        chance: random.Random,
    ) -> None:
        """Wire the parts; ``driver`` is set right after, it needs ``act``."""
        self._layout, self._config, self._store = layout, config, store
        self._server, self._source = server, source
        self._keeper, self._router = keeper, router
        self._clock, self._chance = clock, chance
        self._resolved: ResolvedRelease | None = None
        self._died: dict[SlotName, asyncio.Event] = {"a": asyncio.Event(), "b": asyncio.Event()}
        self.driver: Driver
        self._windows = Windows(clock)
        self._fetching = Fetching(layout, store, server, keeper, chance)
        keeper.on_death = lambda name: self._died[name].set()
        self._repairs = Repairs(
            layout,
            source,
            self._fetching,
            keeper,
            router,
            chance,
            journal=lambda: self.driver.journal,
            bring_up=self._bring_up,
            feed=self._tell,
        )
        self._acts = {
            Command.SERVE_COMMITTED: self._serve_committed,
            Command.CHECK_ADMISSION: self._check_admission,
            Command.FETCH: self._fetch,
            Command.VERIFY: self._verify,
            Command.AWAIT_WINDOW: self._await_window,
            Command.ACTIVATE: self._activate,
            Command.RUN_PROBATION: self._run_probation,
            Command.FINISH_COMMIT: self._finish_commit,
            Command.REVERT: self._revert,
            Command.SERVE_FALLBACK: self._repairs.serve_fallback,
            Command.REPAIR: self._repairs.repair,
            Command.DISCARD_CANDIDATE: self._discard_candidate,
        }

    @property
    def fetched_bytes(self) -> int:
        """Bytes fetched over the network since the start."""
        return self._fetching.fetched_bytes

    async def _tell(self, event: Event) -> None:
        await self.driver.feed(event)

    async def act(self, command: Command) -> Event | None:
        """Perform one command."""
        return await self._acts[command]()

    # ---- before activation: nothing that serves is touched -----------------------------------------------------------

    def _assignment(self) -> Assignment:
        if self.driver.journal.assignment is None:
            raise BugError("the journal has a candidate without its assignment")
        return self.driver.journal.assignment

    async def _resolve(self) -> ResolvedRelease:
        assignment = self._assignment()
        if (
            self._resolved is None
            or self._resolved.assignment.assignment_digest != assignment.assignment_digest
        ):
            self._resolved = await until_reached(
                f"release {assignment.version}", lambda: self._source.resolve(assignment), self._chance
            )
        return self._resolved

    async def _check_admission(self) -> Event:
        resolved = await self._resolve()
        committed = self._committed_slot()
        if (
            committed is not None
        ):  # its golden pack will be asked for; what is damaged of it is easily had now
            with contextlib.suppress(SlmopsError, OSError):
                await self._fetching.mend_documents(committed)
        answer = await asyncio.to_thread(self._fit, resolved)
        return Admitted() if answer.ok else Refused(answer.reasons)

    def _fit(self, resolved: ResolvedRelease) -> Fit:
        facts = read_facts(self._layout, self._config)
        absent = [cut for cut in resolved.chunk_maps if not self._store.has(cut.artifact_sha256)]
        missing = sum(Assembly(self._layout, cut).missing_bytes for cut in absent)
        return fit(
            resolved.variant.model_shape(),
            fit_serving(resolved.assignment.serving),
            profile_of(self._config.profile, facts),
            device_facts(facts, resolved.variant.runtime.name),
            runtime=resolved.variant.runtime.name,
            missing_bytes=missing + DISK_MARGIN_BYTES if missing else 0,
            running_bytes=self._running_bytes(),
            min_decode_tps=resolved.assignment.min_decode_tps,
        )

    def _running_bytes(self) -> int:
        """Memory that what serves now needs, by the same arithmetic as the candidate's."""
        active = self._router.active
        name = active.name if active is not None else self.driver.state.committed_slot
        return self._keeper.memory_bytes(name) if name is not None else 0

    async def _fetch(self) -> Event:
        resolved = await self._resolve()
        before = self.fetched_bytes

        async def in_window(sha256: str, size_bytes: int) -> bytes:
            await self._windows.wait(lambda: self._assignment().download_window, "download")
            return await self._fetching.patiently(sha256, size_bytes)

        for chunk_map in resolved.chunk_maps:
            await self._fetching.complete(chunk_map, in_window)
        moved = self.fetched_bytes - before
        if moved:
            await self.driver.note(fetched_bytes=self.driver.journal.fetched_bytes + moved)
        return Fetched()

    async def _verify(self) -> Event:
        resolved = await self._resolve()
        for chunk_map in resolved.chunk_maps:
            if not self._store.has(chunk_map.artifact_sha256):
                await asyncio.to_thread(self._store.assembly(chunk_map).finish)
        for blob in (resolved.release.golden_pack.sha256, resolved.variant.golden.sha256):
            await asyncio.to_thread(self._store.read_blob, blob)
        return Verified()

    async def _await_window(self) -> Event:
        await self._windows.wait(lambda: self._assignment().activate_window, "activation")
        return WindowOpened()

    # ---- trial -------------------------------------------------------------------------------------------------------

    async def _activate(self) -> Event:
        resolved = await self._resolve()
        name = self.driver.state.candidate_slot
        active = self._router.active
        if active is not None and active.name == name:  # the previous release stands in for a lost one
            await self._router.hold()
            await self._router.drain(active)
        if (
            read_pointer(self._layout.pointer) == name
        ):  # else a power cut now would look like a flipped pointer
            await asyncio.to_thread(self._layout.pointer.unlink, missing_ok=True)
        await self._keeper.stop(name)
        await asyncio.to_thread(write_slot, self._layout, name, resolved.slot())
        await self._bring_up(name)
        await asyncio.to_thread(write_pointer, self._layout.pointer, name)
        return Activated()

    async def _bring_up(self, name: SlotName) -> Backend:
        """Start a slot's engine beside the serving one, or in its place when memory holds only one."""
        running = self._keeper.get(name)
        if running is not None:
            return running
        active = self._router.active
        if active is not None and active.name != name and await asyncio.to_thread(self._needs_cold_swap):
            log.info("memory holds one engine: requests wait while it is swapped")
            await self._router.hold()
            await self._router.drain(active)
            await self._keeper.stop(active.name)
        self._died[name].clear()
        return await self._keeper.start(name)

    def _needs_cold_swap(self) -> bool:
        needed = sum(self._keeper.memory_bytes(name) for name in SLOTS)
        return needed > read_facts(self._layout, self._config).ram_limit_bytes

    async def _run_probation(self) -> Event:
        name = self.driver.state.candidate_slot
        candidate = await self._bring_up(name)
        failure = await self._prove(candidate)
        if failure is not None:
            return Failed(failure)
        await self._router.point_to(candidate)
        minimum = self._assignment().probation_min_s
        if minimum > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._died[name].wait(), minimum)
        if self._died[name].is_set():
            return Failed(
                Failure(
                    "content",
                    "engine.crashed",
                    f"the engine died in probation: {candidate.engine.log_tail()[-300:]}",
                )
            )
        return Proved()

    async def _prove(self, candidate: Backend) -> Failure | None:
        """Golden packs and a short bench; what they showed is persisted before anything is decided by it."""
        committed_slot = self._committed_slot()
        own = await asyncio.to_thread(load_pack, self._store, candidate.slot)
        committed = (
            await asyncio.to_thread(load_pack, self._store, committed_slot)
            if committed_slot is not None
            else None
        )
        baseline = committed_slot.baseline if committed_slot is not None else None
        committed_name = self.driver.state.committed_slot
        old = self._keeper.get(committed_name) if committed_name is not None else None
        result = await run_probation_packs(candidate, own, committed, baseline, old)
        decode_tps = await self._bench(candidate) if result.failure is None else None
        ratios: dict[str, float] = {}
        if decode_tps and baseline is not None and baseline.decode_tps:
            ratios["decode_tps"] = decode_tps / baseline.decode_tps
        await self.driver.note(golden=result.report, ratios=ratios)
        if result.failure is None:
            proved = msgspec.structs.replace(candidate.slot, baseline=Baseline(result.baseline, decode_tps))
            candidate.slot = proved
            await asyncio.to_thread(write_slot, self._layout, candidate.name, proved)
        if not candidate.engine.alive():
            return Failure(
                "content",
                "engine.crashed",
                f"the engine died on its golden pack: {candidate.engine.log_tail()[-300:]}",
            )
        return result.failure

    async def _bench(self, candidate: Backend) -> float | None:
        """Measure the candidate while it has no traffic, and keep it as the device's own bench."""
        began = time.perf_counter()
        try:
            result = await bench_engine(
                candidate.engine,
                prompt_tokens=_BENCH_PROMPT_TOKENS,
                decode_tokens=_BENCH_DECODE_TOKENS,
                repeats=1,
            )
        except (HealthCheckError, SlmopsError) as error:
            log.warning("bench failed: %s", error)
            return None
        properties = await candidate.engine.properties()
        bench = Bench(
            artifact_sha256=candidate.slot.digest_of("model"),
            weights_bytes=properties.model_bytes,
            parameters=properties.parameters,
            prefill_tps=result.prefill_tps,
            decode_tps=result.decode_tps,
            ttft_s=result.ttft_s,
            load_s=result.load_s or 0.0,
            rss_bytes=result.peak_rss_bytes,
            measured_at=self._clock.now().isoformat(timespec="seconds"),
            runtime=candidate.slot.runtime,
        )
        await asyncio.to_thread(write_atomic, self._layout.bench, msgspec.json.encode(bench))
        log.info("bench: %.1f decode tokens/s in %.1f s", result.decode_tps, time.perf_counter() - began)
        return result.decode_tps

    # ---- settling ----------------------------------------------------------------------------------------------------

    def _committed_slot(self) -> Slot | None:
        name = self.driver.state.committed_slot
        return read_slot(self._layout, name) if name is not None else None

    async def _serve_committed(self) -> Event | None:
        """At the start: bring up what was proved, after hashing it. What does not come up is lost until it is repaired."""
        state = self.driver.state
        name = state.committed_slot
        if name is None:
            return None
        if state.phase not in IN_TRIAL and read_pointer(self._layout.pointer) != name:
            with contextlib.suppress(NoSpaceError):  # damaged, or left behind by a revert that failed
                await asyncio.to_thread(write_pointer, self._layout.pointer, name)
        try:
            await self._router.point_to(await self._start_committed(name))
        except (SlmopsError, OSError) as error:
            log.error("the committed release cannot be served: %s", error)
            return Unserved(why_lost(error))
        return None

    async def _finish_commit(self) -> Event | None:
        name = self.driver.state.committed_slot
        if name is None:
            raise BugError("committed without a slot")
        backend = self._keeper.get(name)
        if backend is not None:
            await self._router.point_to(backend)
        other: SlotName = "b" if name == "a" else "a"
        left = next((b for b in self._keeper.running() if b.name == other), None)
        if left is not None:
            await self._router.drain(left)
            await self._keeper.stop(other)
        await asyncio.to_thread(self._collect_garbage)
        return None

    async def _revert(self) -> Event:
        """Pointer, engine and traffic back to the committed slot; the candidate's requests may finish first."""
        state = self.driver.state
        bad: SlotName = state.candidate_slot
        leaving = next((b for b in self._keeper.running() if b.name == bad), None)
        if state.committed_slot is None:
            await self._router.point_to(None)
            await self._keeper.stop(bad)
            await asyncio.to_thread(self._layout.pointer.unlink, missing_ok=True)
            await asyncio.to_thread(sync_folder, self._layout.root)
            return Restored()
        await asyncio.to_thread(write_pointer, self._layout.pointer, state.committed_slot)
        if self._keeper.get(state.committed_slot) is None:
            # Before anything that serves is stopped for it: a damaged slot is nothing to go back to.
            slot = read_slot(self._layout, state.committed_slot)
            if slot is not None:
                await asyncio.to_thread(require_whole, self._store, slot)
        if (
            self._keeper.get(state.committed_slot) is None
            and leaving is not None
            and await asyncio.to_thread(self._needs_cold_swap)
        ):
            await self._router.hold()
            await self._router.drain(leaving)
            await self._keeper.stop(bad)
        await self._router.point_to(await self._start_committed(state.committed_slot))
        if leaving is not None:
            await self._router.drain(leaving)
        await self._keeper.stop(bad)
        return Restored()

    async def _start_committed(self, name: SlotName) -> Backend:
        for attempt in range(_REVERT_ATTEMPTS - 1):
            try:
                return await self._keeper.start(name)
            except DigestError:
                raise  # another try reads the same bytes
            except (SlmopsError, OSError) as error:
                log.error("slot %s does not come up: %s", name, error)
                await asyncio.sleep(0.5 * 2**attempt)
        return await self._keeper.start(name)

    async def _discard_candidate(self) -> Event | None:
        state = self.driver.state
        self._resolved = None
        if state.previous is None and state.committed_slot is not None:
            await asyncio.to_thread(clear_slot, self._layout, state.candidate_slot)
        elif state.committed_slot is None:
            for name in SLOTS:
                await asyncio.to_thread(clear_slot, self._layout, name)
        await asyncio.to_thread(self._collect_garbage)
        return None

    def _collect_garbage(self) -> None:
        if self.driver.state.committed_slot is not None and self._committed_slot() is None:
            return  # its manifest is damaged: nobody knows which files are its
        slots = {name: slot for name in SLOTS if (slot := read_slot(self._layout, name)) is not None}
        remove_views(self._layout, slots)
        freed = self._store.collect_garbage({a.sha256 for slot in slots.values() for a in slot.artifacts})
        if freed:
            log.info("%d bytes of old artifacts removed", freed)
