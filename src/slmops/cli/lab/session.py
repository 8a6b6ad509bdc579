"""One run of the lab: a control plane, and one device after the other, each offered the variant of its class.

The whole path of a release is walked, as in a fleet: signed (with keys that nobody keeps), published, assigned, fetched
over the link that was asked for, admitted, proved by its golden pack, committed; then the device's API is asked.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec

from slmops.artifact.lab_evidence import SCHEMA, LabDevice, LabNetwork, LabReport, LabSpeed
from slmops.artifact.manifest import GoldenPack, Variant, VariantEntry, decode
from slmops.build import load_build
from slmops.cli.lab.networks import parse_network
from slmops.cli.local_fleet.asking import ask
from slmops.cli.local_fleet.fleet import LocalDevice, LocalFleet
from slmops.client.records import BlueprintApplied, DeviceRecord, MemberRecord
from slmops.core.errors import BusyError, SlmopsError
from slmops.testing.link import Link, LinkCounts, LinkProfile

_VERSION = "0-lab"
_QUESTIONS = 8


@dataclass(frozen=True, slots=True)
class LabOptions:
    """What the command was given.

    Attributes:
        build: build directory; ``work``: folder for the fleet, removed by the caller.
        profiles: only variants of these; empty for all.
        network: name or figures of the link; see :mod:`slmops.cli.lab.networks`.
        cpu_cores: share of CPU time of a device's engine.
        context_tokens, kv_cache: serving settings.
        timeout_s: longest that one device may take.
        image: container image that agents run in; empty for processes.
        seed: of what breaks on the link.
    """

    build: Path
    work: Path
    profiles: tuple[str, ...]
    network: str
    cpu_cores: float
    context_tokens: int
    kv_cache: str
    timeout_s: float
    image: str = ""
    seed: int = 0


def run_lab(options: LabOptions, say: Callable[[str], None]) -> LabReport:
    """Offer each variant to a device of its class.

    Args:
        options: what the command was given.
        say: is told what happens, a line at a time.

    Raises:
        UsageError: no build directory, or a profile that it has no variant for.
    """
    build = load_build(options.build)
    started = datetime.now(timezone.utc)
    link = parse_network(options.network)
    fleet = LocalFleet(options.work)
    devices: list[LabDevice] = []
    try:
        fleet.make_keys()
        # A build whose gates failed is just what a lab may be asked about: nothing here reaches anybody's device.
        failed = {f.gate for v in build.variants for f in v.findings if f.verdict in ("fail", "error")}
        bundle = fleet.release(
            options.build, _VERSION, dict.fromkeys(failed, "lab: nothing leaves this machine")
        )
        fleet.start_server(0, "lab")
        fleet.publish(bundle.path)
        pack = decode((bundle.path / "golden-pack.json").read_bytes(), GoldenPack)
        offered = [v for v in bundle.variants if not options.profiles or v[0].profile in options.profiles]
        for index, (entry, variant, _) in enumerate(offered):
            say(f"{index + 1}/{len(offered)} {entry.profile}, {entry.runtime}, network {options.network}")
            lab = _Device(fleet, options, link, f"lab-{index}", entry, variant)
            found = lab.run(build.model, bool(build.prompts), pack, lambda line: say(f"    {line}"))
            say(f"    {found.outcome}{': ' + found.reason if found.reason else ''}")
            devices.append(found)
    finally:
        fleet.close()
    return LabReport(
        SCHEMA,
        build.model,
        build.recipe_sha256,
        started.isoformat(timespec="seconds"),
        metadata.version("slmops"),
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release().split('-')[0]}",
        tuple(devices),
    )


@dataclass(frozen=True, slots=True)
class _Device:
    """One device of the lab, from enrolment to its last answer."""

    fleet: LocalFleet
    options: LabOptions
    link: LinkProfile
    name: str
    entry: VariantEntry
    variant: Variant

    def run(self, model: str, has_prompt: bool, pack: GoldenPack, say: Callable[[str], None]) -> LabDevice:
        """Enrol, offer, ask, stop. What goes wrong is a finding, not an end of the lab."""
        began = datetime.now(timezone.utc)
        with ExitStack() as stack:
            relay = None
            if self.link != LinkProfile():
                place = urlsplit(self.fleet.server_url)
                relay = stack.enter_context(
                    Link(str(place.hostname), int(place.port or 0), self.link, seed=self.options.seed)
                )
            stack.callback(self.fleet.stop, self.name)
            try:
                self._start(relay)
                applied = self.fleet.apply(self._blueprint(model, has_prompt))
                refused = self._not_chosen(applied)
                if refused:
                    return self._finding(began, relay, "refused", refused)
                rollout = self.fleet.follow(applied.rollout_id, self.options.timeout_s, say)
                member = next(m for wave in rollout.waves for m in wave.devices)
                asked, failed, problem = (
                    self._ask(model, pack) if member.status == "committed" else (0, 0, "")
                )
                reason = "" if member.status == "committed" else member.detail or rollout.reason
                return self._finding(began, relay, member.status, reason or problem, member, asked, failed)
            except SlmopsError as error:
                return self._finding(began, relay, "failed", error.message)

    def _start(self, relay: Link | None) -> None:
        """The runtime is named, so that the device cannot be given another runtime's variant of the same profile."""
        self.fleet.start_devices(
            [
                LocalDevice(
                    self.name,
                    self.entry.profile,
                    {"lab": self.name},
                    self.options.cpu_cores,
                    relay.url if relay is not None else "",
                    ("--runtime", self.entry.runtime),
                    self.options.image,
                )
            ]
        )

    def _blueprint(self, model: str, has_prompt: bool) -> str:
        prompt = ", system_prompt: default" if has_prompt else ""
        deadline = int(self.options.timeout_s)
        return f"""
apiVersion: slmops/v1
kind: Blueprint
metadata: {{name: {self.name}}}
selector: "lab = {self.name}"
model: {{name: {model}, version: {_VERSION}}}
serving: {{context_tokens: {self.options.context_tokens}, kv_cache: {self.options.kv_cache}{prompt}}}
rollout:
  waves: [{{limit: 100%, max_failures: 0, dynamic: true}}]
  bake: {{min_s: 0, max_s: 60}}
  deadlines: {{acknowledge_s: {deadline}, update_s: {deadline}}}
  probation_min_s: 1
  on_abort: hold
"""

    def _not_chosen(self, applied: BlueprintApplied) -> str:
        """Why the control plane does not choose the variant of this class for this device; empty when it does."""
        choice = next(c for c in applied.plan.choices if c.device_id == self.name)
        if choice.variant_sha256 == self.entry.sha256:
            return ""
        reasons = [r for refused in choice.refused for r in refused.reasons]
        return "; ".join(reasons) or f"the variant of {choice.variant} was chosen for it"

    def _ask(self, model: str, pack: GoldenPack) -> tuple[int, int, str]:
        failed, problem = 0, ""
        questions = [prompt.messages[-1].content for prompt in pack.prompts[:_QUESTIONS]]
        with httpx.Client(base_url=self.fleet.urls[self.name], timeout=120.0, trust_env=False) as client:
            for index, question in enumerate(questions):
                try:
                    ask(client, model, question, stream=index % 2 == 0)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    failed, problem = failed + 1, f"{type(error).__name__}: {error}"
        return len(questions), failed, problem

    def _finding(
        self,
        began: datetime,
        relay: Link | None,
        outcome: str,
        reason: str,
        member: MemberRecord | None = None,
        asked: int = 0,
        failed: int = 0,
    ) -> LabDevice:
        device = self._record()
        golden = member.golden if member is not None else None
        bench = device.facts.bench if device is not None else None
        counts = relay.counts if relay is not None else LinkCounts()
        return LabDevice(
            variant_sha256=self.entry.sha256,
            profile=self.entry.profile,
            runtime=self.entry.runtime,
            runtime_version=device.facts.runtimes.get(self.entry.runtime, "") if device is not None else "",
            arch=device.facts.arch if device is not None else "",
            emulated=True,
            limits=self._limits(device),
            network=LabNetwork(self.options.network, counts.connections, counts.broken, counts.cut),
            outcome=outcome,
            reason=reason,
            golden_kept=golden.own_passed if golden is not None else 0,
            golden_prompts=golden.own_passed + golden.own_failed if golden is not None else 0,
            asked=asked,
            failed=failed,
            fetched_bytes=device.fetched_bytes if device is not None else 0,
            seconds=round((datetime.now(timezone.utc) - began).total_seconds(), 1),
            speed=None if bench is None else msgspec.convert(msgspec.structs.asdict(bench), LabSpeed),
        )

    def _limits(self, device: DeviceRecord | None) -> dict[str, str]:
        """How limits were enforced, by the agent or from outside."""
        outside = (
            {
                "container": f"podman, {self.options.image}: memory of the profile, {self.options.cpu_cores:g} cores"
            }
            if self.options.image
            else {}
        )
        return outside | (dict(device.facts.limits) if device is not None else {})

    def _record(self) -> DeviceRecord | None:
        try:
            return next((d for d in self.fleet.plane.devices() if d.id == self.name), None)
        except (SlmopsError, BusyError):
            return None
