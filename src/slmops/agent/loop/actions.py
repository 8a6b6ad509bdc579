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
from slmops.agent.ports import Clock, ControlPlane
from slmops.agent.release_source import ReleaseSource, ResolvedRelease
from slmops.agent.retry import until_reached
from slmops.agent.serving import Backend, EngineKeeper, Router
from slmops.agent.store.artifacts import ArtifactStore, Assembly, LocalChunks
from slmops.agent.store.files import free_bytes, sync_folder, write_atomic
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import Baseline, Slot, clear_slot, read_slot, write_pointer, write_slot
from slmops.artifact.manifest import Variant, decode
from slmops.core.device.fit import Fit, Serving, fit, memory_needed
from slmops.core.device.machine import (
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
    Verified,
    WindowOpened,
)
from slmops.core.errors import BugError, HealthCheckError, NoSpaceError, RuntimeLoadError, SlmopsError
from slmops.protocol.messages import Assignment, Bench, ServingSettings
from slmops.runtimes.bench import bench_engine

log = logging.getLogger("slmops.agent")

#: disk kept free beside the files of a release: journal, slots, logs
DISK_MARGIN_BYTES = 8 << 20
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
        #: bytes fetched over the network since the start
        self.fetched_bytes = 0
        keeper.on_death = lambda name: self._died[name].set()
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
            Command.SERVE_FALLBACK: self._serve_fallback,
            Command.DISCARD_CANDIDATE: self._discard_candidate,
        }

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
        answer = await asyncio.to_thread(self._fit, resolved)
        return Admitted() if answer.ok else Refused(answer.reasons)

    def _fit(self, resolved: ResolvedRelease) -> Fit:
        facts = read_facts(self._layout, self._config)
        model = resolved.variant.model_file()
        missing = 0
        if not self._store.has(model.sha256):
            missing = Assembly(self._layout, resolved.chunk_map).missing_bytes + DISK_MARGIN_BYTES
        return fit(
            resolved.variant.model_shape(),
            _fit_serving(resolved.assignment.serving),
            profile_of(self._config.profile, facts),
            device_facts(facts),
            runtime=resolved.variant.runtime.name,
            missing_bytes=missing,
            running_bytes=self._running_bytes(),
            min_decode_tps=resolved.assignment.min_decode_tps,
        )

    def _running_bytes(self) -> int:
        """Memory that the committed release's engine needs, by the same arithmetic as the candidate's."""
        slot = self._committed_slot()
        if slot is None:
            return 0
        variant = decode(self._store.read_blob(slot.digest_of("variant")), Variant)
        return memory_needed(variant.model_shape(), _fit_serving(slot.assignment.serving)).total_bytes

    async def _fetch(self) -> Event:
        resolved = await self._resolve()
        model = resolved.variant.model_file()
        if self._store.has(model.sha256):
            return Fetched()
        assembly = self._store.assembly(resolved.chunk_map)
        needed, free = assembly.missing_bytes, free_bytes(self._layout.root)
        if needed + DISK_MARGIN_BYTES > free:
            raise NoSpaceError(
                f"{needed} bytes are missing, {free} are free",
                hint="free some disk; the device keeps serving what it has",
            )
        local = await asyncio.to_thread(LocalChunks, self._store, self._local_files())
        before = self.fetched_bytes
        for index, offset, sha256, size in list(assembly.missing()):
            content = await asyncio.to_thread(local.get, sha256)
            if content is None:
                content = await self._fetch_chunk(sha256, size)
            await asyncio.to_thread(assembly.write, index, offset, content)
        await self.driver.note(fetched_bytes=self.driver.journal.fetched_bytes + self.fetched_bytes - before)
        return Fetched()

    async def _fetch_chunk(self, sha256: str, size_bytes: int) -> bytes:
        content = await until_reached(
            f"chunk {sha256[:12]}", lambda: self._server.fetch_chunk(sha256, size_bytes), self._chance
        )
        self.fetched_bytes += len(content)
        return content

    def _local_files(self) -> list[tuple[str, str]]:
        """Whole files on this device whose chunks may be taken."""
        slots = [slot for name in _SLOTS if (slot := read_slot(self._layout, name)) is not None]
        return [(a.sha256, a.chunk_map) for slot in slots for a in slot.artifacts if a.chunk_map]

    async def _verify(self) -> Event:
        resolved = await self._resolve()
        model = resolved.variant.model_file()
        if not self._store.has(model.sha256):
            await asyncio.to_thread(self._store.assembly(resolved.chunk_map).finish)
        for blob in (resolved.release.golden_pack.sha256, resolved.variant.golden.sha256):
            await asyncio.to_thread(self._store.read_blob, blob)
        return Verified()

    async def _await_window(self) -> Event:
        return WindowOpened()  # this version's blueprints declare no windows: every moment is inside one

    # ---- trial -------------------------------------------------------------------------------------------------------

    async def _activate(self) -> Event:
        resolved = await self._resolve()
        await asyncio.to_thread(self._store.verify, resolved.variant.model_file().sha256)
        name = self.driver.state.candidate_slot
        await self._keeper.stop(name)
        await asyncio.to_thread(write_slot, self._layout, name, resolved.slot())
        await self._bring_up_candidate()
        await asyncio.to_thread(write_pointer, self._layout.pointer, name)
        return Activated()

    async def _bring_up_candidate(self) -> Backend:
        """Start the candidate's engine beside the serving one, or in its place when memory holds only one."""
        name = self.driver.state.candidate_slot
        running = self._keeper.get(name)
        if running is not None:
            return running
        active = self._router.active
        if (
            active is not None
            and active.name != name
            and await asyncio.to_thread(self._needs_cold_swap, name)
        ):
            log.info("memory holds one engine: requests wait while it is swapped")
            await self._router.hold()
            await self._router.drain(active)
            await self._keeper.stop(active.name)
        self._died[name].clear()
        return await self._keeper.start(name)

    def _needs_cold_swap(self, name: SlotName) -> bool:
        slot = read_slot(self._layout, name)
        if slot is None:
            raise RuntimeLoadError(
                f"slot {name} is empty", hint="let the control plane assign the release again"
            )
        variant = decode(self._store.read_blob(slot.digest_of("variant")), Variant)
        needed = memory_needed(variant.model_shape(), _fit_serving(slot.assignment.serving)).total_bytes
        return needed + self._running_bytes() > read_facts(self._layout, self._config).ram_limit_bytes

    async def _run_probation(self) -> Event:
        name = self.driver.state.candidate_slot
        candidate = await self._bring_up_candidate()
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
        )
        await asyncio.to_thread(write_atomic, self._layout.bench, msgspec.json.encode(bench))
        log.info("bench: %.1f decode tokens/s in %.1f s", result.decode_tps, time.perf_counter() - began)
        return result.decode_tps

    # ---- settling ----------------------------------------------------------------------------------------------------

    def _committed_slot(self) -> Slot | None:
        name = self.driver.state.committed_slot
        return read_slot(self._layout, name) if name is not None else None

    async def _serve_committed(self) -> Event | None:
        """At the start: bring up what was proved. If its engine will not start, keep trying beside everything else."""
        name = self.driver.state.committed_slot
        if name is None:
            return None
        try:
            await self._router.point_to(await self._keeper.start(name))
        except (SlmopsError, OSError) as error:
            log.error("the committed release does not start: %s", error)
            return await self._fall_back_from(name)
        return None

    async def _fall_back_from(self, name: SlotName) -> Event | None:
        for attempt in range(_REVERT_ATTEMPTS):
            await asyncio.sleep(0.5 * 2**attempt)
            with contextlib.suppress(SlmopsError, OSError):
                await self._router.point_to(await self._keeper.start(name))
                return None
        await self._router.give_up(
            "the proved release does not start on this device; it is waiting for a new one"
        )
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
        if (
            self._keeper.get(state.committed_slot) is None
            and leaving is not None
            and await asyncio.to_thread(self._needs_cold_swap, bad)
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
            except (SlmopsError, OSError) as error:
                log.error("going back to slot %s failed: %s", name, error)
                await asyncio.sleep(0.5 * 2**attempt)
        return await self._keeper.start(name)

    async def _serve_fallback(self) -> Event | None:
        await self._router.give_up(
            "this device could not go back to a proved release; it is waiting for a new one"
        )
        await self._keeper.stop_all()
        return None

    async def _discard_candidate(self) -> Event | None:
        state = self.driver.state
        self._resolved = None
        if state.previous is None and state.committed_slot is not None:
            await asyncio.to_thread(clear_slot, self._layout, state.candidate_slot)
        elif state.committed_slot is None:
            for name in _SLOTS:
                await asyncio.to_thread(clear_slot, self._layout, name)
        await asyncio.to_thread(self._collect_garbage)
        return None

    def _collect_garbage(self) -> None:
        slots = [slot for name in _SLOTS if (slot := read_slot(self._layout, name)) is not None]
        freed = self._store.collect_garbage({a.sha256 for slot in slots for a in slot.artifacts})
        if freed:
            log.info("%d bytes of old artifacts removed", freed)


_SLOTS: tuple[SlotName, SlotName] = ("a", "b")


def _fit_serving(serving: ServingSettings | None) -> Serving:
    if serving is None:
        return Serving()
    return Serving(serving.context_tokens, serving.kv_cache, serving.parallel, serving.micro_batch_tokens)
