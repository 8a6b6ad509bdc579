"""Steps on a Ray cluster: the same functions, the same keys, the same cache; only the place differs.

Inputs travel through Ray's object store by digest, each once, and are checked where they arrive; a step's files come back
the same way and enter the content cache here. So no shared disk is needed, and a node that has other code than this
machine is found out before it computes anything. What measures time, and what is too short to be worth a trip, stays
here. ``ray`` is imported when a cluster is asked for (extra ``ray``); which one is Ray's own setting ``RAY_ADDRESS``
(nothing: one is started on this machine).

Source: Ray 2.60 documentation, "Tasks" (max_calls=1: a worker process serves one step, so native memory is given back).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from slmops.build.graph import Step, StepContext, code_digest, resolve, tool_versions
from slmops.build.told import class_of
from slmops.core.errors import BuildError, NetworkError, SlmopsError, UsageError

_POLL_S = 0.5
_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class RayCluster:
    """A connection to a cluster for one build. Safe to use from several threads.

    Raises:
        UsageError: ray is not installed.
        NetworkError: the cluster cannot be reached.
    """

    def __init__(self) -> None:
        try:
            import ray  # noqa: PLC0415 - an extra that most people never need
        except ModuleNotFoundError as error:
            raise UsageError(
                "--engine ray needs ray, which is not installed",
                hint='pip install "slmops[ray]", or leave --engine out: the steps then run on this machine',
            ) from error
        self.ray = ray
        self.objects: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.running: dict[str, Any] = {}
        self.started_here = not ray.is_initialized()
        if self.started_here:
            try:
                ray.init(
                    address=os.environ.get("RAY_ADDRESS") or None,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    runtime_env={"env_vars": _THREADS},
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise NetworkError(
                    f"the Ray cluster at {os.environ.get('RAY_ADDRESS') or 'this machine'} cannot be used: {error}",
                    hint="check RAY_ADDRESS and `ray status`, or leave --engine out",
                ) from error
        self.remote = ray.remote(num_cpus=1, max_retries=0, max_calls=1)(run_there)

    def run(self, step: Step, context: StepContext) -> Any:
        """Run a step on the cluster, put its files into ``context.out``, give its value.

        Raises:
            SlmopsError: as the step said; BuildError when the cluster lost it.
        """
        files = {name: self._stored(path) for name, path in context.files.items()}
        expected = {"code": code_digest(step.run), "tools": tool_versions()}
        names, blobs = list(files), [blob for _, blob in files.values()]
        digests = [digest for digest, _ in files.values()]
        call = self.remote.remote(
            step.run, names, digests, dict(context.values), dict(context.params), expected, *blobs
        )
        self.running[step.name] = call
        try:
            while not self.ray.wait([call], timeout=_POLL_S)[0]:
                context.progress(None, "on the cluster")
            answer = self.ray.get(call)
        except self.ray.exceptions.RayError as error:
            raise BuildError(
                f"step {step.name!r} was lost on the cluster: {str(error).splitlines()[0]}",
                hint="finished steps are cached: run it again; `ray status` shows which nodes are there",
                step=step.name,
            ) from error
        finally:
            self.running.pop(step.name, None)
        if "error" in answer:
            told = answer["error"]
            raise class_of(told["code"])(told["message"], hint=told["hint"], **told["fields"])
        for name, content in answer["files"].items():
            (context.out / name).write_bytes(content)
        return answer["value"]

    def _stored(self, path: Path) -> tuple[str, Any]:
        """A file in the object store, once for each digest."""
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        with self.lock:
            if digest not in self.objects:
                self.objects[digest] = self.ray.put(content)
            return digest, self.objects[digest]

    def close(self) -> None:
        """Cancel what still runs, and leave the cluster."""
        for call in list(self.running.values()):
            self.ray.cancel(call, force=True)
        self.objects.clear()
        if self.started_here:
            self.ray.shutdown()


def run_there(
    run: str,
    names: list[str],
    digests: list[str],
    values: dict[str, Any],
    params: dict[str, Any],
    expected: dict[str, Any],
    *blobs: bytes,
) -> dict[str, Any]:
    """On a node: check code and inputs, run the step in a folder of its own, give value and files (or the error).

    Args:
        run: the step's function.
        names: of its input files; ``digests``: theirs; ``blobs``: their contents, in the same order.
        digests: see above.
        values: input values by name.
        params: of the step.
        expected: code digest and tool versions of the machine that asked.
        blobs: see above.
    """
    try:
        found = {"code": code_digest(run), "tools": tool_versions()}
        if found != expected:
            raise UsageError(
                f"this node has other code or tools for {run}: expected {expected}, found {found}",
                hint="install the same slmops[build] on every node",
            )
        with tempfile.TemporaryDirectory(prefix="slmops-step-") as name:
            inputs, out = Path(name) / "in", Path(name) / "out"
            inputs.mkdir()
            out.mkdir()
            files = {}
            for index, (role, digest, blob) in enumerate(zip(names, digests, blobs, strict=True)):
                if hashlib.sha256(blob).hexdigest() != digest:
                    raise BuildError(f"input {role} arrived damaged", hint="run it again", step=run)
                files[role] = inputs / str(index)
                files[role].write_bytes(blob)
            context = StepContext(files, values, params, out, lambda ratio, note: None)
            value = resolve(run)(context)
            made = {
                path.name: path.read_bytes()
                for path in sorted(out.iterdir())
                if path.is_file() and not path.name.startswith(".")
            }
        return {"value": value, "files": made}
    except SlmopsError as error:
        # as plain values: exceptions with keyword arguments lose them when they are pickled
        told = {"code": error.code, "message": error.message, "hint": error.hint, "fields": error.fields}
        return {"error": told}
