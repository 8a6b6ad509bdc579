"""The variant for a device, and the order that names it."""

from __future__ import annotations

from datetime import datetime, timezone

import msgspec
import pytest
from tests.support.control_plane import FACTS, MiB, VariantSpec, blueprint, make_release

from slmops.artifact.manifest import Variant, assignment_digest, decode
from slmops.core.errors import NotFoundError
from slmops.protocol.documents import Blueprint, load_one
from slmops.protocol.messages import Bench, Facts
from slmops.server.ports.rows import DeviceRow
from slmops.server.services.assign import choose, device_profile, order
from slmops.server.services.catalogue import OpenRelease, OpenVariant

NOW = datetime(2026, 11, 8, tzinfo=timezone.utc)
SPECS = (
    VariantSpec("pi5-8gb", 0.02, 90 * MiB),
    VariantSpec("pi-zero2-512mb", 0.05, 60 * MiB, also_for=("toaster",)),
    VariantSpec("n100-16gb", 0.001, 400 * MiB),
)


def opened(prompts: dict[str, str] | None = None) -> OpenRelease:
    """A release with three variants, as the catalogue opens it."""
    made = make_release("1.0.0", 1, variants=SPECS, prompts=prompts)
    variants = tuple(OpenVariant(e, decode(made.blobs[e.sha256], Variant)) for e in made.release.variants)
    return OpenRelease(made.digest, made.release.target_path(), made.release, variants)


def device(profile: str = "pi5-8gb", facts: Facts = FACTS) -> DeviceRow:
    """A device that has enrolled."""
    return DeviceRow("pi", profile, {}, "", "", NOW, facts)


def read(**changes: str) -> Blueprint:
    """A blueprint, with other serving settings."""
    text = blueprint(version="1.0.0").replace(
        "context_tokens: 1024", changes.get("serving", "context_tokens: 1024")
    )
    return load_one(text, "b.yaml", Blueprint)


def chosen(row: DeviceRow, tried: tuple[str, ...] = (), serving: str = "context_tokens: 1024") -> str:
    """Profile of the variant that the device gets; empty for none."""
    choice = choose(opened(), read(serving=serving).serving, row, running=None, tried=tried)
    return choice.variant.variant.profile if choice.variant else ""


def test_the_own_profile_comes_before_better_variants_of_others() -> None:
    """A variant for another profile is taken only when none of one's own fits."""
    assert chosen(device("pi5-8gb")) == "pi5-8gb"
    assert chosen(device("n100-16gb")) == "n100-16gb"
    assert chosen(device("toaster")) == "pi-zero2-512mb"


def test_an_unlisted_profile_gets_the_best_variant_that_fits() -> None:
    """Lowest KL first."""
    assert chosen(device("something")) == "n100-16gb"
    small = msgspec.structs.replace(FACTS, ram_limit_bytes=300 * MiB)
    assert chosen(device("something", small)) == "pi5-8gb"


def test_what_was_refused_is_not_offered_again() -> None:
    """The next best follows; after all of them nothing."""
    digests = {variant.variant.profile: variant.sha256 for variant in opened().variants}
    row = device()
    assert chosen(row, (digests["pi5-8gb"],)) == "n100-16gb"
    assert chosen(row, (digests["pi5-8gb"], digests["n100-16gb"])) == "pi-zero2-512mb"
    choice = choose(opened(), read().serving, row, running=None, tried=tuple(digests.values()))
    assert choice.variant is None
    assert choice.why_none().count("the device refused it") == 3


@pytest.mark.parametrize(
    ("facts", "serving", "reason"),
    [
        ({"ram_limit_bytes": 50 * MiB}, "context_tokens: 1024", "memory: needs"),
        ({"disk_free_bytes": 100}, "context_tokens: 1024", "disk: needs"),
        ({"runtimes": {}}, "context_tokens: 1024", "runtime: needs llama.cpp, the device has none"),
        ({}, "context_tokens: 16384", "context: 16384 tokens asked, the model was made for 8192"),
        ({}, "context_tokens: 1024, min_decode_tps: 5000", "speed: "),
    ],
)
def test_what_does_not_fit_says_why_with_numbers(facts: dict[str, object], serving: str, reason: str) -> None:
    """For every variant."""
    row = device(facts=msgspec.structs.replace(FACTS, **facts))
    choice = choose(opened(), read(serving=serving).serving, row, running=None)
    assert choice.variant is None
    assert all(any(text.startswith(reason) for text in refusal.reasons) for refusal in choice.refused)


def test_files_that_the_device_has_need_no_room() -> None:
    """The same file under other settings fits on a full disk."""
    row = device(facts=msgspec.structs.replace(FACTS, disk_free_bytes=10))
    release = opened()
    running = release.variants[0].variant
    choice = choose(release, read().serving, row, running=running)
    assert choice.variant is not None
    assert choice.variant.variant.profile == "pi5-8gb"


def test_a_bench_replaces_the_profile() -> None:
    """And an unknown profile is taken for the slowest known board until there is one."""
    assert device_profile("something", FACTS).memory_bandwidth_bytes_s == 1_600_000_000
    bench = Bench("a" * 64, 100_000_000, 134_000_000, 200.0, 50.0, 0.1, 0.5, 1, "2026-11-08T00:00:00Z")
    row = device("something", msgspec.structs.replace(FACTS, bench=bench))
    choice = choose(opened(), read().serving, row, running=None)
    assert choice.fit is not None
    assert choice.fit.speed_is_measured


def test_the_order_names_everything_that_the_device_will_verify() -> None:
    """Its digest is that of release, variant, prompts, settings with defaults, and golden expectations."""
    release = opened(prompts={"default": "Answer in JSON."})
    wanted = read(serving="context_tokens: 1024, system_prompt: default")
    variant = release.variants[0]
    made = order(release, variant, wanted.serving, wanted.rollout, "r-1", 7)
    assert made.assignment_digest == assignment_digest(
        release=release.digest,
        variant=variant.sha256,
        adapters=(),
        prompts=(release.release.prompts[0].sha256,),
        serving={
            "context_tokens": 1024,
            "kv_cache": "q8_0",
            "parallel": 2,
            "micro_batch_tokens": 64,
            "system_prompt": "default",
        },
        golden=variant.variant.golden.sha256,
    )
    assert (made.generation, made.action, made.release_seq, made.target_path) == (
        7, "run", 1, "releases/home-intents/1.0.0.json",
    )  # fmt: skip
    with pytest.raises(NotFoundError, match=r"has no prompt 'default': it has none"):
        order(opened(), variant, wanted.serving, wanted.rollout, "r-1", 7)
