"""Which variant a device gets, and the order that says so.

The server chooses with the function that the device refuses with (``core.device.fit``); they can differ only where
their facts differ: the device knows its free disk and memory of this minute. When it refuses, the next variant is offered.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from slmops.artifact.manifest import NamedBlob, Variant, assignment_digest
from slmops.core.device.fit import Fit, engine_for, fit, memory_needed
from slmops.core.device.profile import BUILTIN_PROFILES, DeviceFacts, DeviceProfile, MeasuredSpeed
from slmops.core.errors import NotFoundError
from slmops.protocol.documents.blueprint import RolloutSpec, Serving
from slmops.protocol.messages import SCHEMA, Assignment, Facts, NamedDigest, ServingSettings
from slmops.server.ports.rows import DeviceRow
from slmops.server.services.catalogue import OpenRelease, OpenVariant

#: a device of a profile that we do not know is taken for the slowest board that we know until it has measured itself
_SLOWEST = min(BUILTIN_PROFILES.values(), key=lambda profile: profile.memory_bandwidth_bytes_s)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one variant is not for a device."""

    profile: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The variant for a device with the numbers behind it, or why there is none."""

    variant: OpenVariant | None
    fit: Fit | None
    refused: tuple[Refusal, ...]

    def why_none(self) -> str:
        """All refusals in one sentence."""
        if not self.refused:
            return "no variant is left to offer"
        return "; ".join(f"{refusal.profile}: {', '.join(refusal.reasons)}" for refusal in self.refused)


def device_facts(facts: Facts, runtime: str) -> DeviceFacts:
    """Facts as the fit of a variant of this runtime wants them."""
    bench = facts.bench
    speed = None
    if bench is not None and bench.speaks_of(engine_for(runtime, facts.runtimes) or runtime):
        speed = MeasuredSpeed(bench.weights_bytes, bench.decode_tps, bench.prefill_tps, bench.parameters)
    return DeviceFacts(facts.ram_limit_bytes, facts.disk_free_bytes, facts.runtimes, facts.cores, speed)


def device_profile(name: str, facts: Facts) -> DeviceProfile:
    """A device's profile; one that we do not know is made from its facts and the slowest known speed."""
    known = BUILTIN_PROFILES.get(name)
    if known is not None:
        return known
    return DeviceProfile(
        name=name,
        arch=facts.arch,
        ram_bytes=max(facts.ram_limit_bytes, 1),
        disk_bytes=max(facts.disk_free_bytes, 1),
        cores=max(facts.cores, 1),
        memory_bandwidth_bytes_s=_SLOWEST.memory_bandwidth_bytes_s,
        compute_flops=_SLOWEST.compute_flops,
        runtimes=tuple(facts.runtimes),
    )


def choose(
    release: OpenRelease,
    serving: Serving,
    device: DeviceRow,
    *,
    running: Variant | None,
    tried: Collection[str] = (),
) -> Choice:
    """The best variant that fits.

    Variants made for the device's profile, or listed as also for it, come first; then any other. Within each, the lowest
    measured KL divergence comes first.

    Args:
        release: what to choose from.
        serving: settings of the blueprint for this device.
        device: for its profile and facts.
        running: the variant that it serves now; its files need not be fetched again.
        tried: variants that the device has refused already.
    """
    profile = device_profile(device.profile, device.facts)
    refused: list[Refusal] = []

    def rank(candidate: OpenVariant) -> tuple[bool, float, int]:
        variant = candidate.variant
        other = device.profile != variant.profile and device.profile not in variant.also_for
        return other, variant.measured.kld_mean, candidate.artifact_bytes

    for candidate in sorted(release.variants, key=rank):
        if candidate.sha256 in tried:
            refused.append(Refusal(candidate.variant.profile, ("the device refused it",)))
            continue
        answer = fit_on(candidate, serving, profile, device, running)
        if answer.ok:
            return Choice(candidate, answer, tuple(refused))
        refused.append(Refusal(candidate.variant.profile, answer.reasons))
    return Choice(None, None, tuple(refused))


def fit_on(
    candidate: OpenVariant,
    serving: Serving,
    profile: DeviceProfile,
    device: DeviceRow,
    running: Variant | None,
) -> Fit:
    """Whether one variant fits one device."""
    settings = serving.for_fit()
    present = {artifact.sha256 for artifact in running.artifacts} if running is not None else set()
    missing = sum(
        artifact.bytes for artifact in candidate.variant.artifacts if artifact.sha256 not in present
    )
    return fit(
        candidate.variant.model_shape(),
        settings,
        profile,
        device_facts(device.facts, candidate.variant.runtime.name),
        runtime=candidate.variant.runtime.name,
        missing_bytes=missing,
        running_bytes=memory_needed(running.model_shape(), settings, running.runtime.name).total_bytes
        if running is not None
        else 0,
        min_decode_tps=serving.min_decode_tps,
    )


def serving_settings(serving: Serving) -> ServingSettings:
    """All serving settings, defaults written out."""
    return ServingSettings(
        context_tokens=serving.context_tokens,
        kv_cache=serving.kv_cache,
        parallel=serving.parallel,
        micro_batch_tokens=serving.micro_batch_tokens,
        system_prompt=serving.system_prompt or "",
    )


def prompts_in_use(release: OpenRelease, serving: Serving) -> tuple[NamedBlob, ...]:
    """The release's prompts that a blueprint names.

    Raises:
        NotFoundError: the release has no prompt of this name.
    """
    if serving.system_prompt is None:
        return ()
    found = tuple(prompt for prompt in release.release.prompts if prompt.name == serving.system_prompt)
    if not found:
        names = ", ".join(prompt.name for prompt in release.release.prompts) or "none"
        raise NotFoundError(
            f"release {release.release.model} {release.release.version} has no prompt {serving.system_prompt!r}: "
            f"it has {names}",
            hint="serving.system_prompt names a prompt that is signed into the release",
        )
    return found


def order(
    release: OpenRelease,
    variant: OpenVariant,
    serving: Serving,
    rollout: RolloutSpec,
    rollout_id: str,
    generation: int,
) -> Assignment:
    """The order to run a variant; its digest is the identity that "running equals assigned" compares.

    Args:
        release: what to run.
        variant: of it, for this device.
        serving: this device's settings, overlays included.
        rollout: when, and for how long on probation.
        rollout_id: the rollout that orders it.
        generation: of the device.
    """
    prompts = prompts_in_use(release, serving)
    settings = serving_settings(serving)
    digest = assignment_digest(
        release=release.digest,
        variant=variant.sha256,
        adapters=(),
        prompts=tuple(prompt.sha256 for prompt in prompts),
        serving=msgspec.to_builtins(settings),
        golden=variant.variant.golden.sha256,
    )
    return Assignment(
        schema=SCHEMA,
        generation=generation,
        action="run",
        assignment_digest=digest,
        rollout_id=rollout_id,
        model=release.release.model,
        version=release.release.version,
        release_sha256=release.digest,
        release_seq=release.release.release_seq,
        target_path=release.target_path,
        variant_sha256=variant.sha256,
        prompts=tuple(NamedDigest(prompt.name, prompt.sha256, prompt.bytes) for prompt in prompts),
        serving=settings,
        min_decode_tps=serving.min_decode_tps,
        probation_min_s=rollout.probation_min_s,
        download_window=rollout.windows.download or "",
        activate_window=rollout.windows.activate or "",
    )
