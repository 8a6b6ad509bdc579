"""Memory, disk and speed before the first byte, by hand-computed figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.core.device.fit import (
    KV_TYPES,
    RUNTIME_BASE_BYTES,
    RUNTIME_MEMORY,
    Fit,
    ModelShape,
    Serving,
    effective_bandwidth,
    engine_for,
    fit,
    kv_cache_bytes,
    memory_needed,
    predict_decode_tps,
)
from slmops.core.device.profile import BUILTIN_PROFILES, DeviceFacts, DeviceProfile, MeasuredSpeed
from slmops.core.errors import UsageError

MiB = 1 << 20
#: SmolLM2-135M: 30 layers, 3 KV heads of 64
SMOL = ModelShape(98_000_000, 134_515_008, 30, 192, 192, 576, 1536, 49_152, 8192)
PI5 = BUILTIN_PROFILES["pi5-8gb"]
DEFAULT = Serving()
FACTS = DeviceFacts(1 << 30, 1 << 30, {"llama.cpp": "1"}, cores=4)


def ask(serving: Serving = DEFAULT, facts: DeviceFacts = FACTS, **more: object) -> Fit:
    return fit(SMOL, serving, PI5, facts, runtime="llama.cpp", **{"missing_bytes": 98_000_000, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "expected"),
    # 2048 tokens x 30 layers x (192 + 192) elements x bytes per element, for one conversation
    [("f16", 47_185_920), ("f32", 94_371_840), ("q8_0", 25_067_520), ("q4_0", 13_271_040)],
)
def test_kv_cache(kind: str, expected: int) -> None:
    assert kv_cache_bytes(SMOL, Serving(2048, kind, parallel=1)) == expected


def test_the_cache_is_padded_to_256_tokens() -> None:
    assert kv_cache_bytes(SMOL, Serving(2049)) == kv_cache_bytes(SMOL, Serving(2304))


def test_memory_adds_up() -> None:
    memory = memory_needed(SMOL, Serving(2048, "q8_0", parallel=2, micro_batch_tokens=64))
    buffers = 4 * 64 * (49_152 + 12 * 1536) + 4 * 49_152 * 2
    assert (memory.weights_bytes, memory.kv_cache_bytes, memory.buffers_bytes) == (
        98_000_000,
        2 * 25_067_520,
        buffers,
    )
    assert memory.total_bytes == 98_000_000 + 2 * 25_067_520 + buffers + RUNTIME_BASE_BYTES


@given(context=st.integers(64, 8192), kind=st.sampled_from(sorted(KV_TYPES)), batch=st.integers(8, 512))
def test_more_context_or_batch_never_needs_less(context: int, kind: str, batch: int) -> None:
    here = memory_needed(SMOL, Serving(context, kind, micro_batch_tokens=batch)).total_bytes
    assert memory_needed(SMOL, Serving(context + 1, kind, micro_batch_tokens=batch)).total_bytes >= here
    assert memory_needed(SMOL, Serving(context, kind, micro_batch_tokens=batch + 1)).total_bytes >= here


@pytest.mark.parametrize("parallel", [1, 2])
def test_decode_reads_all_weights_and_half_of_its_own_cache(parallel: int) -> None:
    serving = Serving(2048, "q8_0", parallel)
    assert predict_decode_tps(SMOL, serving, 1e9) == pytest.approx(1e9 / (98_000_000 + 25_067_520 / 2))


def test_a_bench_replaces_the_profiles_bandwidth() -> None:
    """Measured on another file, the speed scales by the bytes that a token reads."""
    assert effective_bandwidth(None, PI5) == pytest.approx(0.6 * PI5.memory_bandwidth_bytes_s)
    measured = MeasuredSpeed(weights_bytes=49_000_000, decode_tps=40.0)
    assert effective_bandwidth(measured, PI5) == pytest.approx(49_000_000 * 40)
    answer = ask(facts=replace(FACTS, speed=measured))
    assert answer.speed_is_measured
    assert answer.predicted_decode_tps == pytest.approx(49_000_000 * 40 / (98_000_000 + 25_067_520 / 2))


def test_a_variant_that_fits() -> None:
    answer = ask(min_decode_tps=15)
    assert (answer.ok, answer.reasons, answer.swap) == (True, (), "blue_green")
    assert not answer.speed_is_measured


@pytest.mark.parametrize(
    ("facts", "more", "reason"),
    [
        (replace(FACTS, ram_limit_bytes=100 * MiB), {}, "memory: needs 2"),
        (
            replace(FACTS, disk_free_bytes=97_999_999),
            {},
            "disk: needs 98000000 bytes more, the device has 97999999",
        ),
        (replace(FACTS, runtimes={}), {}, "runtime: needs llama.cpp, the device has none"),
        (replace(FACTS, runtimes={"b": "1", "a": "2"}), {}, "the device has a, b"),
        (FACTS, {"serving": Serving(8193)}, "context: 8193 tokens asked, the model was made for 8192"),
        (FACTS, {"min_decode_tps": 500}, "predicted from its profile, 500 asked"),
        (
            replace(FACTS, speed=MeasuredSpeed(10**8, 1.0)),
            {"min_decode_tps": 5},
            "from its own bench, 5 asked",
        ),
    ],
)
def test_a_refusal_carries_both_numbers(facts: DeviceFacts, more: dict[str, object], reason: str) -> None:
    answer = ask(facts=facts, **more)  # type: ignore[arg-type]
    assert not answer.ok
    assert len(answer.reasons) == 1
    assert reason in answer.reasons[0]


def test_all_reasons_are_given_at_once() -> None:
    assert len(ask(facts=DeviceFacts(MiB, 0), min_decode_tps=1e6).reasons) == 4


def test_the_limits_themselves_fit() -> None:
    exact = memory_needed(SMOL, Serving()).total_bytes
    assert ask(facts=replace(FACTS, ram_limit_bytes=exact, disk_free_bytes=98_000_000)).ok
    assert not ask(facts=replace(FACTS, ram_limit_bytes=exact - 1)).ok


def test_without_room_for_both_engines_the_swap_is_cold() -> None:
    need = memory_needed(SMOL, Serving()).total_bytes
    facts = replace(FACTS, ram_limit_bytes=2 * need)
    assert ask(facts=facts, running_bytes=need).swap == "blue_green"
    assert ask(facts=facts, running_bytes=need + 1).swap == "cold"


@pytest.mark.parametrize("make", [lambda: Serving(kv_cache="f8"), lambda: Serving(context_tokens=63)])
def test_serving_settings_are_checked_when_they_are_made(make: object) -> None:
    assert callable(make)
    with pytest.raises(UsageError) as caught:
        make()
    assert caught.value.hint


@pytest.mark.parametrize("name", ["", "Pi5", "-pi", "a" * 64, "pi 5", "pi/5", "pi5\n"])
def test_profile_names_are_safe_to_use_anywhere(name: str) -> None:
    with pytest.raises(UsageError, match="is not valid"):
        replace(PI5, name=name)


@pytest.mark.parametrize(
    "field", ["ram_bytes", "disk_bytes", "cores", "memory_bandwidth_bytes_s", "compute_flops"]
)
def test_profile_figures_are_positive(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field} must be positive, got 0"):
        replace(PI5, **{field: 0})


def test_builtin_profiles_are_unlike() -> None:
    profiles = list(BUILTIN_PROFILES.values())
    assert [name for name in BUILTIN_PROFILES] == [profile.name for profile in profiles]
    assert all(isinstance(profile, DeviceProfile) for profile in profiles)
    profiles = [
        profile for profile in profiles if profile.agent
    ]  # phones have fast memory and lend little of it
    assert sorted(profiles, key=lambda p: p.ram_bytes) == sorted(
        profiles, key=lambda p: p.memory_bandwidth_bytes_s
    )


@pytest.mark.parametrize(
    ("runtime", "available", "engine"),
    [
        ("llama.cpp", {"llama.cpp"}, "llama.cpp"),
        ("llama.cpp", {"llama.cpp", "external"}, "external"),
        ("llama.cpp", {"external"}, "external"),
        ("litert", {"external", "llama.cpp"}, None),
        ("litert", {"litert"}, "litert"),
    ],
)
def test_an_owners_own_server_opens_what_llama_cpp_opens(
    runtime: str, available: set[str], engine: str | None
) -> None:
    assert engine_for(runtime, available) == engine
    facts = replace(FACTS, runtimes=dict.fromkeys(available, "1"))
    answer = fit(SMOL, DEFAULT, PI5, facts, runtime=runtime, missing_bytes=0)
    assert any("runtime: needs" in reason for reason in answer.reasons) is (engine is None)


@pytest.mark.parametrize(
    ("runtime", "file_bytes", "context", "parallel", "measured_mib"),
    # highest resident memory of the engine child, SmolLM2-135M, micro-batch 64, one thread (bench/memory.py)
    [
        ("onnxruntime-genai", 113_627_597, 512, 1, 310),  # int4
        ("onnxruntime-genai", 113_627_597, 2048, 1, 373),
        ("onnxruntime-genai", 113_627_597, 2048, 2, 478),
        ("onnxruntime-genai", 266_999_426, 512, 1, 350),  # int8, whose embedding is mapped and partly touched
        ("onnxruntime-genai", 266_999_426, 2048, 2, 536),
        ("onnxruntime-genai", 540_328_112, 512, 1, 817),  # fp32
        ("executorch", 652_766_208, 1024, 1, 1057),  # fp32
    ],
)
def test_each_runtime_needs_what_was_measured(
    runtime: str, file_bytes: int, context: int, parallel: int, measured_mib: int
) -> None:
    """Never much less than an engine really took (a device would kill it), and at most half more."""
    shape = replace(SMOL, weights_bytes=file_bytes)
    needed = memory_needed(shape, Serving(context, parallel=parallel), runtime).total_bytes
    assert 0.98 * measured_mib * MiB <= needed <= 1.5 * measured_mib * MiB


def test_a_fixed_cache_type_wins_over_the_settings() -> None:
    """A runtime whose export decides the cache's type needs the same whatever the blueprint says; llama.cpp does not."""
    for runtime, how in RUNTIME_MEMORY.items():
        small = memory_needed(SMOL, Serving(2048, "q4_0"), runtime).total_bytes
        large = memory_needed(SMOL, Serving(2048, "f16"), runtime).total_bytes
        assert (small == large) == (how.kv_type is not None)
    one = memory_needed(SMOL, Serving(2048, parallel=1), "executorch").kv_cache_bytes
    assert memory_needed(SMOL, Serving(2048, parallel=4), "executorch").kv_cache_bytes == one
    assert memory_needed(SMOL, Serving(), "external") == memory_needed(SMOL, Serving(), "llama.cpp")
