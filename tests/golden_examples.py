"""The objects behind the golden vectors of ``tests/golden/v1``: every field of every format is used in one of them.

The files are the law and are never regenerated: a format that changes gets a new folder (``v2``), and these stay
readable.
"""

from __future__ import annotations

import msgspec

from slmops.artifact import manifest as m
from slmops.artifact.chunkmap import Chunk, ChunkMap
from slmops.protocol import messages as p


def fake(character: str) -> str:
    """A digest that is easy to see."""
    return character * 64


SHAPE = {
    "weights_bytes": 82_000_000,
    "parameters": 134_515_008,
    "layers": 30,
    "k_width": 192,
    "v_width": 192,
    "hidden": 576,
    "ffn": 1536,
    "vocabulary": 49_152,
    "context_max_tokens": 8192,
}

CHUNK_MAP = ChunkMap(1, "gguf", 4_194_368, fake("a"), (Chunk(64, fake("b")), Chunk(4_194_304, fake("c"))))

VARIANT = m.Variant(
    schema=1,
    model="home-intents",
    profile="pi5-8gb",
    runtime=m.RuntimeNeed("llama.cpp", "2026.10.11549"),
    artifacts=(
        m.ArtifactEntry(
            "model", "home-intents-pi5-8gb.gguf", "gguf", 84_000_000, fake("a"), m.Blob(2100, fake("b"))
        ),
    ),
    shape=SHAPE,
    golden=m.Blob(900, fake("c")),
    measured=m.Measured(
        bits_per_weight=4.99,
        kld_mean=0.0123,
        same_top_ratio=0.951,
        perplexity=33.05,
        decode_tps=61.5,
        prefill_tps=257.0,
        load_s=0.52,
        rss_bytes=201_000_000,
        exact_match_ratio=0.643,
        schema_valid_ratio=1.0,
        schema_valid_constrained_ratio=1.0,
    ),
    quantised={"F32": 61, "Q4_1": 200, "Q8_0": 11},
    also_for=("n100-16gb",),
    predicted_decode_tps=58.25,
)

RELEASE = m.Release(
    schema=1,
    model="home-intents",
    version="1.2.0",
    release_seq=7,
    created="2026-11-23T12:00:00Z",
    base=m.Base("SmolLM2-135M-Instruct", fake("d"), "apache-2.0"),
    licence="apache-2.0",
    variants=(m.VariantEntry("pi5-8gb", "llama.cpp", 1400, fake("e"), 84_000_000),),
    golden_pack=m.Blob(2000, fake("f")),
    evidence=m.Blob(3000, fake("0")),
    provenance=m.Blob(4000, fake("1")),
    prompts=(m.NamedBlob("default", 120, fake("2")),),
    adapters=(m.NamedBlob("home-intents-fi@1.0.0", 4_900_000, fake("3")),),
    waivers=(m.Waiver("task.exact_match", "drill: this release is bad on purpose"),),
    golden_weakened="two prompts removed: the intent is gone",
)

PACK = m.GoldenPack(
    schema=1,
    prompts=(
        m.GoldenPrompt(
            "lights-on",
            (
                m.GoldenMessage("system", "Answer in JSON."),
                m.GoldenMessage("user", "Sytytä valot, kiitos – 🙂"),
            ),
            '{"intent":"HassTurnOn","slots":{"domain":"light"}}',
        ),
    ),
    max_drop_ratio=0.125,
)

EXPECTATIONS = m.GoldenExpectations(
    schema=1,
    pack_sha256=fake("f"),
    reference_sha256=fake("4"),
    expectations=(m.GoldenExpectation("lights-on", fake("5"), -0.25, 0.125, -1.5),),
)

#: a later addition, in a file of its own: the first one never changes
EXPECTATIONS_TRACED = m.GoldenExpectations(
    schema=1,
    pack_sha256=fake("f"),
    reference_sha256=fake("4"),
    expectations=(
        m.GoldenExpectation(
            "slmops-text", fake("5"), -3.25, 0.125, -1000.0, m.GoldenTrace("q8_0", "ADD/", 0.1875, 0.25)
        ),
    ),
)

BENCH = p.Bench(
    fake("a"), 82_000_000, 134_515_008, 257.5, 61.5, 0.25, 0.5, 201_000_000, "2026-11-23T12:00:00Z"
)
FACTS = p.Facts(
    arch="aarch64",
    cores=4,
    ram_limit_bytes=2_147_483_648,
    disk_free_bytes=8_000_000_000,
    runtimes={"llama.cpp": "2026.10.11549"},
    agent_version="0.1.0",
    limits={"memory": "cgroup v1"},
    bench=BENCH,
)
ASSIGNMENT = p.Assignment(
    schema=1,
    generation=12,
    action="run",
    assignment_digest=fake("6"),
    rollout_id="r-2026-11-23-1",
    model="home-intents",
    version="1.2.0",
    release_sha256=fake("7"),
    release_seq=7,
    target_path="releases/home-intents/1.2.0.json",
    variant_sha256=fake("e"),
    prompts=(p.NamedDigest("default", fake("2"), 120),),
    adapters=(p.NamedDigest("home-intents-fi@1.0.0", fake("3"), 4_900_000),),
    serving=p.ServingSettings(2048, "q8_0", 2, 64, "default"),
    min_decode_tps=15.0,
    probation_min_s=60.0,
)
CHECKIN = p.CheckinRequest(
    schema=1,
    boot_id="b-1",
    seq=41,
    generation=11,
    phase="reverted",
    running=fake("8"),
    running_release=fake("9"),
    candidate=fake("6"),
    fetched_bytes=98_000_000,
    requests=1200,
    failed_requests=1,
    facts=FACTS,
    outcome=p.OutcomeReport(
        assignment_digest=fake("6"),
        rollout_id="r-2026-11-23-1",
        generation=11,
        status="reverted",
        cause="content",
        code="device.health_check",
        detail="golden pack lost 5 of 11",
        golden=p.GoldenReport(8, 0, both=3, only_old=5, only_new=1, neither=2, lost=("lights-on",)),
        ratios={"decode_tps": 0.97},
        fetched_bytes=1_000_000,
        failed_requests=1,
    ),
    stale_since="2026-11-20T00:00:00Z",
)

MANIFESTS: dict[str, object] = {
    "release": RELEASE,
    "variant": VARIANT,
    "golden-pack": PACK,
    "golden-expectations": EXPECTATIONS,
    "golden-expectations-traced": EXPECTATIONS_TRACED,
}
MESSAGES: dict[str, msgspec.Struct] = {
    "enroll-request": p.EnrollRequest(
        1, "token-1", "-----BEGIN PUBLIC KEY-----\n", "kitchen", "pi5-8gb", FACTS, {"site": "hki"}
    ),
    "enroll-response": p.EnrollResponse(1, "kitchen-2", '{"signed":{}}', 30.0),
    "checkin-request": CHECKIN,
    "checkin-request-other-runtime": msgspec.structs.replace(
        CHECKIN,
        facts=msgspec.structs.replace(FACTS, bench=msgspec.structs.replace(BENCH, runtime="litert-lm")),
        outcome=p.OutcomeReport(
            fake("6"), "r-2026-11-23-1", 11, "committed", golden=p.GoldenReport(8, 0, by_answers=True)
        ),
    ),
    "checkin-request-idle": p.CheckinRequest(1, "b-1", 1, 0, "idle"),
    "checkin-response": p.CheckinResponse(1, 41, 30.0, ASSIGNMENT),
    "checkin-response-quiet": p.CheckinResponse(1, 42, 30.0),
    "assignment-windows": p.Assignment(
        1, 14, "run", fake("6"), download_window="0 1 * * * +4h", activate_window="0 3 * * 0 +2h"
    ),
    "assignment-withdraw": p.Assignment(1, 13, "withdraw", fake("6"), rollout_id="r-2026-11-23-1"),
    "problem": p.Problem(
        "urn:slmops:error:trust.digest",
        "trust.digest",
        422,
        "chunk: expected sha256 aa, got bb",
        "trust.digest",
        "fetch it again",
        {"bytes": 10, "ratio": 0.5, "known": True, "path": None, "name": "x"},
    ),
}
