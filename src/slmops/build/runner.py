"""Runs a step graph: what is cached is not run, what is independent runs side by side, a failure stops the rest.

The calling thread decides and reports; one thread for each running step watches its process. Steps that measure time
(``exclusive``) run alone, after everything else that can run.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slmops.artifact.digest import digest_of
from slmops.build.cache import Cache, StepResult
from slmops.build.durations import Durations
from slmops.build.events import Progress, StepEvent, StepState
from slmops.build.files import naming_full_disks
from slmops.build.graph import Output, SourceFile, Step, StepContext, key_of, resolve, tool_versions
from slmops.build.ray_engine import RayCluster
from slmops.build.told import class_of
from slmops.core.errors import BugError, BuildError, SlmopsError

_LOG_TAIL_BYTES = 2000
_STOP_DEADLINE_S = 10.0
#: numpy must not start threads of its own: each step has one core
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class Finished:
    """All results of a run.

    Attributes:
        results: by step name.
        ran: names of the steps that were run, the others were cached.
        seconds: wall time.
    """

    results: Mapping[str, StepResult]
    ran: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Happened:
    """From a watching thread: progress (``ratio``, ``note``), or the end (``result`` or ``error``)."""

    step: str
    ratio: float | None = None
    note: str = ""
    result: StepResult | None = None
    error: BaseException | None = None


class _Run:
    """The state of one run; only the calling thread touches it."""

    def __init__(
        self,
        steps: Sequence[Step],
        cache: Cache,
        progress: Progress,
        workers: int,
        cluster: RayCluster | None = None,
    ) -> None:
        self.cluster = cluster
        self.durations = Durations(cache.folder)
        self.waiting = list(steps)
        self.total = len(steps)
        self.cache = cache
        self.tell = progress
        self.workers = workers
        self.results: dict[str, StepResult] = {}
        self.ran: list[str] = []
        self.running: dict[str, tuple[Step, float]] = {}
        self.keys_running: dict[str, str] = {}
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.threads: list[threading.Thread] = []
        self.stopping = False
        self.events: queue.SimpleQueue[_Happened] = queue.SimpleQueue()
        self.began_s = time.monotonic()

    def report(self, step: str, state: StepState, ratio: float | None, began_s: float, note: str) -> None:
        now_s = time.monotonic()
        running = {name: (one, now_s - began) for name, (one, began) in self.running.items()}
        left_s = self.durations.left_s(self.waiting, running, self.workers)
        self.tell(StepEvent(step, state, ratio, now_s - began_s, note, len(self.results), self.total, left_s))

    def start_what_can(self) -> None:
        """Settle cached steps and start others, in the graph's order, as long as there is room."""
        settled = True
        while settled:
            settled = False
            for step in list(self.waiting):
                if not self._is_ready(step):
                    continue
                inputs = {name: self._digest(source) for name, source in step.inputs.items()}
                key = key_of(step, inputs)
                found = self.cache.find(key)
                if found is not None:
                    self.waiting.remove(step)
                    self.results[step.name] = found
                    self.report(step.name, "cached", 1.0, time.monotonic(), "")
                    settled = True
                elif self._has_room(step) and key not in self.keys_running:
                    self.waiting.remove(step)
                    self._start(step, key, inputs)
                    settled = settled or step.light or self.workers == 0

    def _is_ready(self, step: Step) -> bool:
        needed = (source.step for source in step.inputs.values() if isinstance(source, Output))
        return all(name in self.results for name in needed)

    def _has_room(self, step: Step) -> bool:
        if step.exclusive:
            others = any(self._is_ready(other) and not other.exclusive for other in self.waiting)
            return not self.running and not others
        alone = any(other.exclusive for other, _ in self.running.values())
        return not alone and len(self.running) < max(self.workers, 1)

    def _digest(self, source: Output | SourceFile) -> str:
        if isinstance(source, SourceFile):
            return source.sha256
        result = self.results[source.step]
        if source.is_many:
            return digest_of({name: result.files[name].sha256 for name in source.pick(result.files)})
        return result.files[source.file].sha256 if source.file else result.value_digest()

    def _start(self, step: Step, key: str, inputs: dict[str, str]) -> None:
        files: dict[str, Path] = {}
        values: dict[str, Any] = {}
        for name, source in step.inputs.items():
            if isinstance(source, SourceFile):
                files[name] = source.path
            elif source.is_many:
                made = self.results[source.step].files
                files |= {one: self.cache.path(made[one].sha256) for one in source.pick(made)}
            elif source.file:
                files[name] = self.cache.path(self.results[source.step].files[source.file].sha256)
            else:
                values[name] = self.results[source.step].value
        began_s = time.monotonic()
        self.running[step.name] = (step, began_s)
        self.keys_running[key] = step.name
        self.report(step.name, "started", 0.0, began_s, "")

        def work() -> None:
            folder = None
            try:
                with naming_full_disks(self.cache.folder):
                    folder = self.cache.work_folder()

                def note(ratio: float | None, text: str) -> None:
                    self.events.put(_Happened(step.name, ratio, text))

                checkpoints = self.cache.folder / "checkpoints" / key
                context = StepContext(
                    files, values, dict(step.params), folder, note, self.cache.memo, checkpoints
                )
                inline = step.light or self.workers == 0
                with naming_full_disks(folder):
                    if inline:
                        value = resolve(step.run)(context)
                    elif self.cluster is not None and not step.exclusive:
                        value = self.cluster.run(step, context)
                    else:
                        value = self._in_a_process(step, context)
                result = self.cache.keep(
                    key,
                    folder,
                    value,
                    run=step.run,
                    params=step.params,
                    inputs=inputs,
                    tools=tool_versions(),
                    seconds=time.monotonic() - began_s,
                )
                shutil.rmtree(checkpoints, ignore_errors=True)
                self.events.put(_Happened(step.name, result=result))
            except BaseException as error:
                self.events.put(_Happened(step.name, error=error))
            finally:
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)

        if step.light or self.workers == 0:
            work()
            self.take(wait=False)
        else:
            thread = threading.Thread(target=work, name=f"step {step.name}", daemon=True)
            self.threads.append(thread)
            thread.start()

    def _in_a_process(self, step: Step, context: StepContext) -> Any:
        config = {
            "run": step.run,
            "files": {name: str(path) for name, path in context.files.items()},
            "values": context.values,
            "params": context.params,
            "out": str(context.out),
            "memo": str(context.memo) if context.memo is not None else None,
            "checkpoints": str(context.checkpoints),
        }
        with tempfile.TemporaryFile() as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "slmops.build.step_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | _ENVIRONMENT,
            )
            self.children[step.name] = child
            try:
                if self.stopping:
                    raise BuildError(
                        f"step {step.name!r} was stopped", hint="another step failed: see its message"
                    )
                assert child.stdin is not None and child.stdout is not None
                child.stdin.write(json.dumps(config).encode() + b"\n")
                child.stdin.flush()
                ended = _read_events(child.stdout, context.progress)
                child.wait()
            finally:
                child.kill()
                child.wait()
                for pipe in (child.stdin, child.stdout):
                    if pipe is not None:
                        pipe.close()
                del self.children[step.name]
            if "error" in ended:
                raise _error_of(step, ended["error"], ended.get("os_error"), _tail(log))
            if "value" not in ended:
                raise BuildError(
                    f"step {step.name!r} died with exit status {child.returncode}: {_tail(log) or 'it wrote nothing'}",
                    hint="if it was killed for memory, use fewer --workers; finished steps are cached: run it again",
                    step=step.name,
                    exit_code=child.returncode,
                )
            return ended["value"]

    def take(self, *, wait: bool) -> None:
        """Handle what the watching threads tell; with ``wait``, at least one thing.

        Raises:
            SlmopsError: a step failed.
        """
        while True:
            try:
                happened = self.events.get(block=wait)
            except queue.Empty:
                return
            wait = False
            _, began_s = self.running[happened.step]
            if happened.error is not None:
                self.report(
                    happened.step,
                    "failed",
                    None,
                    began_s,
                    str(happened.error).splitlines()[0] if str(happened.error) else "",
                )
                raise happened.error
            if happened.result is None:
                self.report(happened.step, "progress", happened.ratio, began_s, happened.note)
                continue
            step, _ = self.running.pop(happened.step)
            self.durations.note(step, happened.result.seconds)
            self.keys_running.pop(happened.result.key, None)
            self.results[happened.step] = happened.result
            self.ran.append(happened.step)
            self.report(happened.step, "done", 1.0, began_s, happened.note)

    def stop(self) -> None:
        """Kill what still runs, and wait until the watching threads have cleaned up after it."""
        self.stopping = True
        for child in list(self.children.values()):
            child.kill()
        if self.cluster is not None:
            self.cluster.close()
        self.durations.save()
        for thread in self.threads:
            thread.join(_STOP_DEADLINE_S)


def run_steps(
    steps: Sequence[Step], cache: Cache, *, progress: Progress, workers: int = 2, engine: str = "local"
) -> Finished:
    """Run a graph to its end.

    Args:
        steps: in an order in which every step comes after those it needs.
        cache: where results are kept.
        progress: called from this thread.
        workers: processes at once; 0 runs every step in this process.
        engine: ``local``, or ``ray``: processes of a Ray cluster (:mod:`slmops.build.ray_engine`).

    Raises:
        SlmopsError: as the failing step said; BuildError when its process died. Steps that ended well stay cached.
    """
    _check(steps)
    cache.sweep()
    run = _Run(steps, cache, progress, workers, RayCluster() if engine == "ray" else None)
    try:
        while run.waiting or run.running:
            run.start_what_can()
            if run.running:
                run.take(wait=True)
    finally:
        run.stop()
        cache.sweep()  # a step of a build that was killed may have written a last file while this one began
    return Finished(run.results, tuple(run.ran), time.monotonic() - run.began_s)


def _check(steps: Sequence[Step]) -> None:
    seen: set[str] = set()
    for step in steps:
        missing = [
            source.step
            for source in step.inputs.values()
            if isinstance(source, Output) and source.step not in seen
        ]
        if missing or step.name in seen:
            raise BugError(f"step {step.name!r}: needs {missing} before it, or comes twice")
        seen.add(step.name)


def _read_events(stream: IO[bytes], progress: Callable[[float | None, str], None]) -> dict[str, Any]:
    """Pass progress on; the last event that is none is the end."""
    ended: dict[str, Any] = {}
    for line in stream:
        event: dict[str, Any] = json.loads(line)
        if "ratio" in event:
            progress(event["ratio"], event["note"])
        else:
            ended = event
    return ended


def _tail(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(size - _LOG_TAIL_BYTES, 0))
    return log.read().decode("utf-8", "replace").strip()


def _error_of(step: Step, told: Mapping[str, Any], os_error: int | None, tail: str) -> SlmopsError:
    """The error that a step's process told, as the class that it was."""
    if os_error is not None and os_error not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return BuildError(
            f"step {step.name!r} failed: {tail.splitlines()[-1] if tail else os.strerror(os_error)}",
            hint="see the message",
            step=step.name,
        )
    return class_of(told["code"])(told["message"], hint=told["hint"], **told["fields"])
