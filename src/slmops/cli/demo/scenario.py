"""The main job, step by step, in the order in which a person would do it.

Everything is real: the model, the engine, the signatures, the HTTP, seven processes and their engines. What the demo
checks at the end is what it promises at the beginning.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx

from slmops.build import describe, load_build, run_build
from slmops.cli.build.steps import show_steps
from slmops.cli.build.tables import print_variants, variant_name
from slmops.cli.demo.fleets import USUAL, DemoFleet, Member, find_environments, write_external_config
from slmops.cli.demo.load import LoadClient, eval_commands
from slmops.cli.demo.outcome import print_summary, summary_of, unexpected
from slmops.cli.local_fleet.asking import ask
from slmops.cli.local_fleet.fleet import LocalDevice, LocalFleet
from slmops.cli.output import Progress, megabytes, percent
from slmops.cli.rollout.printing import print_rollout
from slmops.client.records import RolloutDetail
from slmops.core.device.fit import EXTERNAL
from slmops.core.errors import BugError, BusyError, GateError, NotFoundError
from slmops.core.rollout.machine import Phase

GOOD, BAD, NEXT = "1.0.0", "1.0.1", "1.0.2"
_ROLLOUT_TIMEOUT_S = 420.0
#: where the control plane listens unless somebody has it: the commands' default, so that they work without --server
_SERVER_PORT = 8420


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command was given."""

    project: Path
    work: Path
    fast: bool
    fleet: DemoFleet = USUAL


@dataclass
class Scenario:
    """One run of the demo."""

    options: DemoOptions
    began: float = field(default_factory=time.monotonic)
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Lay out the work folder; what an earlier run rolled out is removed, what it built is kept."""
        work = self.options.work
        work.mkdir(parents=True, exist_ok=True)
        self._lock = (work / "demo.lock").open("w", encoding="ascii")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BusyError(
                f"another demo is running in {work}",
                hint="stop it with Ctrl-C first, or give this one a folder of its own: slmops demo --work DIR",
            ) from error
        self._run = work / "run"
        shutil.rmtree(self._run, ignore_errors=True)
        self._fleet = LocalFleet(self._run)
        self._load: LoadClient | None = None

    def run(self) -> dict[str, Any]:
        """Do the whole job; returns the summary."""
        if self.options.fleet is not USUAL:
            find_environments(
                self.options.fleet.members, self.options.project.resolve().parents[1], self.options.work
            )
        self._say("1 · model and task")
        self._make_dataset()
        self._say("2 · build: one variant for each profile, measured as shipped")
        good = self._build(self.options.fleet.recipe, "good", self.options.fleet.targets)
        self._show_build(good)
        self._say("3 · release: signed with offline keys")
        self._make_keys()
        good_bundle = self._release(good, GOOD, {})
        self._say(f"4 · control plane and {len(self.options.fleet.members)} devices")
        self._start_server()
        self._publish(good_bundle)
        self._start_devices()
        self._say(f"5 · rollout of {GOOD} in waves")
        first = self._roll_out(GOOD)
        self._ask_one_device()
        self._say(f"6 · a bad release ({BAD}): signed, loads fine, answers garbage")
        bad = self._build("bad-recipe.yaml", "bad", None)
        bad_bundle = self._release(bad, BAD, self._waivers_for(bad))
        self._publish(bad_bundle)
        self._start_load()
        rollouts = [first, self._roll_out(BAD)]
        if self.options.fleet is not USUAL:
            self._say(f"7 · taken back: {NEXT} reaches every engine, and its operator changes their mind")
            rollouts += [self._take_back(good)]
        self._summarise(good, rollouts)
        return self.summary

    # ---- build and sign ----------------------------------------------------------------------------------------------

    def _make_dataset(self) -> None:
        data = self.options.project / "data"
        script = self.options.project / "make_dataset.py"
        if not script.is_file():
            raise NotFoundError(
                f"{script} is missing: --project is no project that the demo knows how to feed",
                hint="leave --project away, or copy examples/home-intents as a whole",
            )
        subprocess.run(
            [sys.executable, str(script), "--out", str(data)], check=True, stdout=subprocess.DEVNULL
        )
        click.echo(f"home-assistant-intents: commands to JSON, split by template ({data})")

    def _build(self, recipe: str, name: str, targets: tuple[str, ...] | None) -> Path:
        folder = self.options.work / "build" / name
        cache = self.options.work / "cache"
        result = run_build(
            self.options.project / recipe,
            folder,
            cache_dir=cache,
            targets=targets,
            fast=self.options.fast,
            progress=show_steps(Progress()),
            workers=2,
        )
        click.echo(f"{result.steps_run} steps run, {result.steps_cached} known, {result.seconds:.0f} s")
        return folder

    def _show_build(self, folder: Path) -> None:
        described = describe(load_build(folder))
        print_variants(described["variants"])
        scores = described["scores"]
        for name, words in (("base", "the base model"), ("reference", "merged, before quantising")):
            if name in scores:
                score = scores[name]
                rate = percent(score["exact_match_ratio"])
                click.echo(f"exact match on held-out templates, {words}: {rate} of {score['items']}")
        for gate in described["gates"]:
            of = variant_name(gate.get("profile", ""), gate.get("runtime", ""))
            click.echo(f"  {gate['verdict']:<12} {of} {gate['gate']}: {gate['reason']}")
        again = run_build(
            self.options.project / self.options.fleet.recipe,
            folder,
            cache_dir=self.options.work / "cache",
            targets=self.options.fleet.targets,
            fast=self.options.fast,
            progress=lambda event: None,
            workers=2,
        )
        click.echo(
            f"the same build again: {'something changed' if again.changed else 'nothing to do'} ({again.seconds:.1f} s)"
        )

    def _make_keys(self) -> None:
        self._fleet.make_keys()
        click.echo("root and release keys are offline; the control plane only holds its own online key")

    def _release(self, build: Path, version: str, waivers: dict[str, str]) -> Path:
        bundle = self._fleet.release(build, version, waivers)
        click.echo(
            f"signed {bundle.release.model}@{version}, digest {bundle.digest[:16]}, release_seq {bundle.release.release_seq}"
        )
        for waiver in bundle.release.waivers:
            click.secho(f"  waived {waiver.gate}: {waiver.reason}", fg="yellow")
        return bundle.path

    def _waivers_for(self, build: Path) -> dict[str, str]:
        """Waive what the bad build fails: the drill is about what happens after somebody did."""
        failed = {
            gate["gate"]
            for gate in describe(load_build(build))["gates"]
            if gate["verdict"] in ("fail", "error")
        }
        if not failed:
            raise BugError("the bad release passes its build gates: it would prove nothing")
        return dict.fromkeys(sorted(failed), "drill: shows that devices refuse a bad release by themselves")

    # ---- control plane and devices -----------------------------------------------------------------------------------

    def _start_server(self) -> None:
        self._fleet.start_server(_SERVER_PORT, "demo")
        click.echo(
            f"control plane: {self._fleet.server_url}  (dashboard; sign in with the token in {self._fleet.token_file})"
        )

    def _publish(self, bundle: Path) -> None:
        report = self._fleet.publish(bundle)
        click.echo(f"published: {report.blobs_sent} blobs, {megabytes(report.bytes_sent)} sent")

    def _start_devices(self) -> None:
        members, canary = self.options.fleet.members, self.options.fleet.canary
        # an engine of these devices computes with one thread: the default of one core
        self._fleet.start_devices(
            [
                LocalDevice(
                    member.name,
                    member.profile,
                    {"site": "hki" if index % 2 else "tre"}
                    | ({"canary": "always"} if member.name == canary else {}),
                    options=self._engine_options(member),
                )
                for index, member in enumerate(members)
            ]
        )
        click.echo(f"{len(members)} agents enrolled with one-time tokens and running; canary: {canary}")

    def _engine_options(self, member: Member) -> list[str]:
        """Hold a device to its engine; the owner's own server needs to be told how it is started."""
        if not member.runtime:
            return []
        options = ["--runtime", member.runtime]
        if member.runtime == EXTERNAL:
            root = self.options.project.resolve().parents[1]
            options += ["--external", str(write_external_config(root, self._run / "external.json"))]
        return options

    # ---- rollouts ----------------------------------------------------------------------------------------------------

    def _roll_out(self, version: str) -> RolloutDetail:
        text = (
            (self.options.project / self.options.fleet.blueprint)
            .read_text(encoding="utf-8")
            .replace(f"version: {GOOD}", f"version: {version}")
        )
        applied = self._fleet.apply(text)
        for choice in applied.plan.choices:
            if version == GOOD:
                click.echo(
                    f"  {choice.device_id}: variant {choice.variant}{self._engine_of(choice.device_id)}, "
                    f"{megabytes(choice.artifact_bytes)}, "
                    f"{megabytes(choice.memory_bytes)} of memory"
                )
        found = self._fleet.follow(
            applied.rollout_id, _ROLLOUT_TIMEOUT_S, say=lambda line: click.echo(f"  {line}")
        )
        print_rollout(found)
        if version == GOOD:
            self._say_limits()
        return found

    def _take_back(self, build: Path) -> RolloutDetail:
        """Roll out one more release, and undo it: each engine swaps forth and back while it is asked."""
        self._publish(self._release(build, NEXT, {}))
        there = self._roll_out(NEXT)
        if there.phase != Phase.COMPLETED.value:
            return there
        self._fleet.plane.rollout_action(there.id, "rollback", "drill: every device goes back")
        back = self._fleet.follow(there.id, _ROLLOUT_TIMEOUT_S, say=lambda line: click.echo(f"  {line}"))
        print_rollout(back)
        return back

    def _engine_of(self, device: str) -> str:
        """`` on ENGINE``, for a device that is held to one."""
        runtime = next(m.runtime for m in self.options.fleet.members if m.name == device)
        return f" on {runtime}" if runtime else ""

    def _say_limits(self) -> None:
        """Whether memory and CPU limits are really enforced here, in the runtime's own words."""
        seen: dict[str, None] = {}
        for device in self._fleet.plane.devices():
            for limit, how in device.facts.limits.items():
                seen[f"{limit} by {how}"] = None
        for text in seen:
            click.echo(f"  limit: {text}")

    def _ask_one_device(self) -> None:
        command, gold = next(
            (command, gold)
            for command, gold in eval_commands(self.options.project / "data" / "eval.jsonl")
            if len(command) < 60 and '"slots":{}' not in gold
        )
        with httpx.Client(
            base_url=self._fleet.urls[self.options.fleet.canary], timeout=120.0, trust_env=False
        ) as client:
            answer, release = ask(client, "home-intents", command, stream=True)
        click.echo(
            f"asked {self.options.fleet.canary}: {command!r}\n   answer: {answer}\n   expected: {gold}\n   by release: {release}"
        )

    def _start_load(self) -> None:
        commands = [command for command, _ in eval_commands(self.options.project / "data" / "eval.jsonl")]
        self._load = LoadClient(self._fleet.urls, "home-intents", commands)
        self._load.start()
        click.echo("a client now asks all devices, all the time")

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _summarise(self, build: Path, rollouts: list[RolloutDetail]) -> None:
        if self._load is None:
            raise BugError("no load was started")
        tally = self._load.stop()
        self._load = None
        seconds = round(time.monotonic() - self.began, 1)
        described = describe(load_build(build))
        self.summary = summary_of(described, rollouts, tally, self._fleet.plane.devices(), seconds)
        self.summary["fast"] = self.options.fast
        self._say("summary")
        print_summary(self.summary)

    def require_expected_outcome(self) -> None:
        """Fail when the demo did not show what it promises.

        Raises:
            GateError: names what went otherwise.
        """
        problems = unexpected(self.summary, len(self.options.fleet.members), GOOD)
        if problems:
            raise GateError(
                "the demo did not end as it must: " + "; ".join(problems),
                hint=f"see the logs in {self._fleet.processes.logs}",
            )

    def keep_up(self) -> None:
        """Keep everything running until Ctrl-C."""
        click.echo(
            f"\nThe fleet stays up until Ctrl-C.\n  dashboard: {self._fleet.server_url} (token: {self._fleet.token_file})\n"
            f"  model:     {self._fleet.urls[self.options.fleet.canary]}"
        )
        try:
            while True:
                self._fleet.processes.check()
                time.sleep(1.0)
        except KeyboardInterrupt:
            click.echo("stopping")

    def close(self) -> None:
        """Stop whatever runs."""
        if self._load is not None:
            self._load.stop()
        self._fleet.close()
        self._lock.close()

    def _say(self, title: str) -> None:
        click.secho(f"\n{title}  [{time.monotonic() - self.began:.0f} s]", bold=True)
