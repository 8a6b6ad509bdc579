"""A whole build, through the real engine, of a tiny model: reproducible, resumable, and never half-written."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner
from tests.support.control_plane import running_plane
from tests.support.tiny_project import SMALL_EVALUATION, SMALL_SEARCH, make_tiny_project

from slmops.artifact.chunkmap import decode_chunk_map
from slmops.artifact.digest import digest_of, sha256_hex
from slmops.artifact.gguf_layout import parse_gguf
from slmops.artifact.manifest import GoldenExpectations, GoldenPack, decode
from slmops.build import BuildResult, StepEvent, describe, diff, load_build, run_build
from slmops.build.fault_catalogue import PROBES
from slmops.build.gguf_file import open_gguf
from slmops.build.steps.golden_trace import TEXT_ID
from slmops.cli.build.group import build as build_commands
from slmops.core.device.fit import ModelShape, Serving, memory_needed
from slmops.core.errors import (
    BaseModelError,
    BudgetError,
    ConflictError,
    DigestError,
    DocumentError,
    LeakageError,
    NoSpaceError,
    NotFoundError,
)
from slmops.core.evidence.golden import PromptExpectation, PromptScore, judge_own
from slmops.release import Workspace, create_release, init_keys, publish, verify_bundle

#: runs a build in a process of its own, one line an event
SCRIPT = """
import resource, sys
from pathlib import Path
from slmops.build import run_build
recipe, out, cache, workers, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    show = lambda event: print(event.state, event.step, flush=True)
    result = run_build(Path(recipe), Path(out), cache_dir=Path(cache), workers=int(workers), progress=show)
    print("END", result.changed)
except Exception as error:
    print("ERROR", type(error).__name__, error)
"""


class Built:
    """One build that the tests of this module look at; its cache serves those that build on."""

    def __init__(self, folder: Path) -> None:
        self.recipe = make_tiny_project(folder / "project")
        self.cache = folder / "cache"
        self.out = folder / "build"
        self.events: list[StepEvent] = []
        self.result = run_build(
            self.recipe, self.out, cache_dir=self.cache, workers=2, progress=self.events.append
        )

    def again(
        self, out: Path, recipe: Path | None = None, targets: Sequence[str] | None = None
    ) -> BuildResult:
        return run_build(recipe or self.recipe, out, cache_dir=self.cache, workers=0, targets=targets)

    def changed_recipe(self, name: str, **changes: object) -> Path:
        document = yaml.safe_load(self.recipe.read_text()) | changes
        path = self.recipe.with_name(name)
        path.write_text(yaml.safe_dump(document))
        return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("tiny"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_directory_holds_what_its_index_says(built: Built) -> None:
    """Every file by digest; chunks tile the model; each variant keeps its budget and passes its own golden pack."""
    build = load_build(built.out)
    for file in build.files():
        content = (built.out / file.path).read_bytes()
        assert (len(content), sha256_hex(content)) == (file.bytes, file.sha256)
    assert [v.profile for v in build.variants] == ["pi-zero2-512mb", "pi5-8gb"]
    pack = decode((built.out / build.golden_pack.path).read_bytes(), GoldenPack)
    assert [p.id for p in pack.prompts][2:] == [TEXT_ID]
    for variant, budget in zip(build.variants, (120_000, 170_000), strict=True):
        content = (built.out / variant.model.path).read_bytes()
        assert 0.9 * budget < len(content) <= budget
        layout = parse_gguf(content)
        assert layout.metadata["general.license"] == "apache-2.0"
        assert "tokenizer.chat_template" in layout.metadata
        chunk_map = decode_chunk_map((built.out / variant.chunk_map.path).read_bytes())
        assert chunk_map.artifact_sha256 == variant.model.sha256
        assert all(sha256_hex(content[at : at + c.bytes]) == c.sha256 for at, c in chunk_map.offsets())
        expected = decode((built.out / variant.golden_expectations.path).read_bytes(), GoldenExpectations)
        assert expected.pack_sha256 == build.golden_pack.sha256
        assert expected.reference_sha256 == build.reference_sha256
        assert {e.id for e in expected.expectations} == {p.id for p in pack.prompts}
        assert variant.measured.rss_bytes > len(content)
        assert variant.measured.decode_tps > 0
    small, large = build.variants
    assert large.measured.kld_mean <= small.measured.kld_mean + 1e-6
    assert (built.out / "prompts" / "default").read_bytes() == b"Answer in JSON."


def test_the_evidence_says_what_the_search_rests_on(built: Built) -> None:
    """Gradients where torch is installed, else measured damage and why; and how well predictions rank what was measured."""
    sensitivity = json.loads((built.out / "evidence.json").read_bytes())["sensitivity"]
    if importlib.util.find_spec("torch"):
        assert sensitivity["method"] == "kfac"
        assert "gradients" in {step.name for step in built.result.build.steps}
    else:
        assert sensitivity["method"] == "measured damage"
        assert "torch" in sensitivity["reason"]
    assert -1 <= sensitivity["rank_correlation"] <= 1
    assert sensitivity["measured_groups"] >= 3


def test_insisting_on_gradients_without_torch_is_refused(built: Built, tmp_path: Path) -> None:
    """Before any work, by name."""
    if importlib.util.find_spec("torch"):
        pytest.skip("torch is installed here")
    search = {**yaml.safe_load(built.recipe.read_text())["search"], "sensitivity": "kfac"}
    with pytest.raises(DocumentError, match="torch"):
        built.again(tmp_path / "kfac", built.changed_recipe("kfac.yaml", search=search))


def test_choices_are_verified_and_repaired(built: Built, tmp_path: Path) -> None:
    """With verification the types are the best of what was measured, within the same budget, and the same again."""
    search = {**yaml.safe_load(built.recipe.read_text())["search"], "verify_tokens": 96, "neighbours": 6}
    recipe = built.changed_recipe("verified.yaml", search=search)
    result = built.again(tmp_path / "verified", recipe, ["pi-zero2-512mb"])
    (variant,) = json.loads((result.folder / "evidence.json").read_bytes())["variants"]
    verified = variant["verified"]
    assert verified["after"] <= verified["before"] == verified["choices"][0]
    assert verified["after"] <= min(verified["choices"])
    assert verified["measurements"] > len(verified["choices"])
    assert variant["artifact_bytes"] <= 120_000
    assert variant["ways"]["feedback"] > 0
    plain = json.loads((built.out / "evidence.json").read_bytes())["variants"][0]
    assert plain["verified"] is None


def test_speed_is_a_second_price(built: Built, tmp_path: Path) -> None:
    """A table in which one type is fast: asked for a speed that only it reaches, the choice takes it; the evidence says so."""
    table = {"machine": "lab", "seconds_per_weight": {"Q4_0": 1e-9, "Q5_0": 9e-9, "Q8_0": 9e-9, "Q6_K": 9e-9}}
    (built.recipe.parent / "speeds.json").write_text(json.dumps(table))
    search = {**yaml.safe_load(built.recipe.read_text())["search"], "speed": "speeds.json"}
    targets = [{"profile": "pi5-8gb", "budget": {"artifact_bytes": "170kB", "decode_tps": 4000}}]
    recipe = built.changed_recipe("fast.yaml", search=search, targets=targets)
    result = built.again(tmp_path / "fast", recipe)
    (variant,) = json.loads((result.folder / "evidence.json").read_bytes())["variants"]
    assert variant["speed"]["machine"] == "lab" and variant["speed"]["met"]
    assert variant["speed"]["predicted_decode_tps"] >= 4000
    plain = built.changed_recipe("plain.yaml", targets=targets)
    given = run_build(
        plain,
        tmp_path / "given",
        cache_dir=built.cache,
        workers=0,
        speed_table=built.recipe.parent / "speeds.json",
    )
    assert given.build.variants[0].model.sha256 == result.build.variants[0].model.sha256
    before = built.result.build.variants[1].quantised
    assert result.build.variants[0].quantised.get("Q4_0", 0) > before.get("Q4_0", 0)


def test_the_speed_of_types_is_measured(built: Built, tmp_path: Path) -> None:
    """By the engine's own bench, here, and recorded as an input of the choice."""
    search = {
        **yaml.safe_load(built.recipe.read_text())["search"],
        "speed": "measure",
        "types": ["Q4_0", "Q8_0"],
    }
    recipe = built.changed_recipe("measured.yaml", search=search)
    result = built.again(tmp_path / "measured", recipe, ["pi5-8gb"])
    (variant,) = json.loads((result.folder / "evidence.json").read_bytes())["variants"]
    assert variant["speed"]["predicted_decode_tps"] > 0
    table = json.loads((result.folder / "evidence.json").read_bytes())["speed_table"]
    assert set(table["seconds_per_weight"]) == {"Q4_0", "Q8_0"}
    provenance = json.loads((result.folder / "provenance.json").read_bytes())
    (step,) = [step for step in provenance["steps"] if step["name"] == "speed of types"]
    assert step["value_sha256"] == digest_of(table)


def test_another_budget_is_an_assembly(built: Built, tmp_path: Path) -> None:
    """Tensors that keep their type under the new budget are not quantised again; a budget of before quantises nothing."""
    pieces = {path for path in (built.cache / "memo").rglob("*") if path.is_file()}
    assert pieces
    recipe = built.changed_recipe(
        "other-budget.yaml", targets=[{"profile": "pi5-8gb", "budget": {"artifact_bytes": "168kB"}}]
    )
    result = built.again(tmp_path / "other", recipe)
    assert result.steps_run <= 10  # what the budget decides, and what judges the file
    new = {path for path in (built.cache / "memo").rglob("*") if path.is_file()} - pieces
    quantised = sum(n for kind, n in result.build.variants[0].quantised.items() if kind not in ("F16", "F32"))
    assert len(new) < quantised / 2


def test_evidence_and_provenance_tell_the_whole_way(built: Built) -> None:
    """Scores before, after and quantised; gates; base, steps, sources and tools by digest; nothing of this machine."""
    evidence = json.loads((built.out / "evidence.json").read_bytes())
    assert evidence["reference"]["items"] == 4
    assert evidence["base"]["items"] == 1
    for variant in evidence["variants"]:
        assert {gate["gate"] for gate in variant["gates"]} >= {"kld.mean"}
        assert variant["figures"]["scored_tokens"] == evidence["text"]["scored_tokens"] > 0
        assert variant["fallbacks"]
    provenance = json.loads((built.out / "provenance.json").read_bytes())
    names = [step["name"] for step in provenance["steps"]]
    assert names.index("merge adapter.gguf") < names.index("imatrix") < names.index("quantise: pi5-8gb")
    merge = provenance["steps"][names.index("merge adapter.gguf")]
    assert merge["inputs"]["adapter"] == provenance["sources"]["adapter-0"]
    assert merge["outputs"]["model.gguf"] == provenance["reference_sha256"]
    assert set(provenance["sources"]) >= {"eval", "calibration", "schema", "system_prompt", "base"}
    assert set(provenance["tools"]) >= {"gguf", "numpy", "xllamacpp"}
    for name in ("evidence.json", "provenance.json", "build.json"):
        assert str(built.recipe.parent).encode() not in (built.out / name).read_bytes()


def test_a_second_run_does_nothing_and_says_so(built: Built) -> None:
    """No step runs, no file changes."""
    before = {path: path.stat().st_mtime_ns for path in built.out.rglob("*")}
    again = built.again(built.out)
    assert (again.changed, again.steps_run) == (False, 0)
    assert again.steps_cached == len(load_build(built.out).steps)
    assert {path: path.stat().st_mtime_ns for path in built.out.rglob("*")} == before
    assert diff(built.result.build, again.build) == {}


def test_equal_inputs_give_equal_bytes(built: Built, tmp_path: Path) -> None:
    """From an empty cache, in one process instead of several, under another path: the same artifacts."""
    recipe = make_tiny_project(tmp_path / "elsewhere")
    run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "cache", workers=0)
    ours, theirs = files_of(tmp_path / "build"), files_of(built.out)
    same = [
        name for name in theirs if name not in ("build.json", "evidence.json")
    ]  # measured speeds are in these
    assert len(same) == 9
    assert [name for name in same if ours[name] != theirs[name]] == []


def test_progress_tells_every_step(built: Built) -> None:
    """Each step starts and ends once; measuring speed comes last and alone; the count arrives at the total."""
    total = len(load_build(built.out).steps)
    started = [event.step for event in built.events if event.state == "started"]
    done = [event.step for event in built.events if event.state == "done"]
    assert sorted(started) == sorted(done)
    assert len(done) == total
    assert all(name.startswith("speed") for name in done[-2:])
    assert (built.events[-1].finished, built.events[-1].total) == (total, total)
    assert any(event.state == "progress" and event.ratio for event in built.events)


def test_one_target_of_the_recipe(built: Built, tmp_path: Path) -> None:
    """Only what it needs is run; a profile that is no target is named."""
    only = built.again(tmp_path / "one", targets=["pi5-8gb"])
    assert [v.profile for v in only.build.variants] == ["pi5-8gb"]
    assert diff(built.result.build, only.build)["variants"]["pi-zero2-512mb"] == "removed"
    with pytest.raises(NotFoundError, match="no target n100"):
        built.again(tmp_path / "none", targets=["n100-16gb"])


def test_describing_a_build(built: Built) -> None:
    """Plain JSON values, with the figures by the names that evidence uses."""
    described = json.loads(json.dumps(describe(built.result.build)))
    first = described["variants"][0]
    assert first["measured"]["kld_mean"] == built.result.build.variants[0].measured.kld_mean
    assert {gate["gate"] for gate in described["gates"]} == {"kld.mean", "decode_tps"}
    assert built.result.verdict == "inconclusive"


def test_an_impossible_budget_names_what_bounds_it(built: Built, tmp_path: Path) -> None:
    """The largest tensors and the smallest possible size; that size works, one byte less does not."""
    asked = [{"profile": "pi5-8gb", "budget": {"artifact_bytes": 30_000}}]
    with pytest.raises(
        BudgetError, match=r"smallest possible file has \d+ bytes .*token_embd\.weight|ffn_"
    ) as caught:
        built.again(tmp_path / "small", built.changed_recipe("small.yaml", targets=asked))
    assert not (tmp_path / "small").exists()
    least = int(str(caught.value.fields["smallest_bytes"]))
    asked[0]["budget"] = {"artifact_bytes": least - 1}
    with pytest.raises(BudgetError):
        built.again(tmp_path / "small", built.changed_recipe("small.yaml", targets=asked))
    asked[0]["budget"] = {"artifact_bytes": least}
    result = built.again(tmp_path / "small", built.changed_recipe("small.yaml", targets=asked))
    assert result.build.variants[0].model.bytes == least


def test_an_impossible_budget_is_refused_before_anything_is_measured(built: Built, tmp_path: Path) -> None:
    """The shapes say it; minutes of measuring would say the same."""
    asked = [{"profile": "pi5-8gb", "budget": {"artifact_bytes": 30_000}}]
    begun: list[str] = []
    with pytest.raises(BudgetError):
        run_build(
            built.changed_recipe("early.yaml", targets=asked),
            tmp_path / "early",
            cache_dir=tmp_path / "empty",
            workers=0,
            progress=lambda event: begun.append(event.step),
        )
    assert "possible: pi5-8gb" in begun
    assert not {"imatrix", "damage 1", "errors"} & set(begun)


def test_a_memory_budget_bounds_the_file_too(built: Built, tmp_path: Path) -> None:
    """KV cache, buffers and runtime are taken off before the weights get the rest."""
    asked = [{"profile": "pi5-8gb", "budget": {"artifact_bytes": "1MB", "ram_bytes": "20MB"}}]
    with pytest.raises(BudgetError, match="ram_bytes 20000000 leaves 0 bytes") as caught:
        built.again(tmp_path / "small", built.changed_recipe("ram.yaml", targets=asked))
    assert caught.value.fields["bound"] == "ram_bytes"


def evidence_of(folder: Path) -> Any:
    return json.loads((folder / "evidence.json").read_bytes())


def test_evidence_names_its_evaluation_set_and_its_warnings(built: Built) -> None:
    """Digest, items in order, bounds of each estimated figure, and a light for each label-free signal."""
    evidence = evidence_of(built.out)
    frozen = evidence["evaluation_set"]
    assert frozen["sha256"] == sha256_hex(built.recipe.with_name("eval.jsonl").read_bytes())
    assert len(frozen["items"]) == 4
    assert built.result.build.evaluation_set["items_sha256"] == frozen["items_sha256"]
    assert evidence["seen_before"] == {"reason": None, "overlaps": []}
    for variant in evidence["variants"]:
        estimates = variant["figures"]["estimates"]
        assert {"kld_mean", "kld_p99", "same_top_ratio", "flips_ratio", "perplexity"} <= set(estimates)
        assert estimates["kld_mean"]["low"] < variant["figures"]["kld_mean"]
        assert {w["signal"] for w in variant["warnings"]} == {
            "kld_mean",
            "kld_p99",
            "flips_ratio",
            "top_flips_ratio",
        }
    assert describe(built.result.build)["warnings"]
    assert evidence["golden"]["noticed"] == {}  # nothing was tried: the default


def test_golden_prompts_are_tried_on_faulty_models_when_asked(built: Built, tmp_path: Path) -> None:
    trying = built.changed_recipe("trying.yaml", evaluation={**SMALL_EVALUATION, "golden_candidates": 12})
    built.again(tmp_path / "trying", trying)
    assert set(evidence_of(tmp_path / "trying")["golden"]["noticed"]) == {fault.name for fault in PROBES}


def test_build_show_says_what_is_amber_or_red(built: Built, tmp_path: Path) -> None:
    """With thresholds that nothing meets: each variant's signal in words, after the gates; the verdicts are as they were."""
    strict = {**SMALL_EVALUATION, "warnings": {"kld_mean": [0.0, 0.0]}}
    strict_build = built.again(tmp_path / "strict", built.changed_recipe("strict.yaml", evaluation=strict))
    shown = CliRunner().invoke(build_commands, ["show", str(tmp_path / "strict")])
    assert shown.exit_code == 0
    assert shown.output.count("is red") == shown.output.count("it stops nothing by itself") == 2
    assert strict_build.steps_run == 0
    assert strict_build.verdict == built.result.verdict


def test_builds_on_different_evaluation_sets_are_not_compared(built: Built, tmp_path: Path) -> None:
    """Another item, or another order: figures and gates are left out of the difference, and it says why."""
    changed = built.recipe.with_name("eval-2.jsonl")
    lines = built.recipe.with_name("eval.jsonl").read_text().replace("turn on light 11", "turn on light 99")
    changed.write_text(lines)
    task = yaml.safe_load(built.recipe.read_text())["task"] | {"eval": "eval-2.jsonl"}
    other = built.again(tmp_path / "other", built.changed_recipe("eval-2.yaml", task=task))
    found = diff(built.result.build, other.build)
    assert "different evaluation sets (sha256" in found["not_comparable"]
    assert not any(name.startswith("scores.") for name in found)
    figures = {name for change in found.get("variants", {}).values() for name in change}
    assert not figures & {"kld_mean", "perplexity", "same_top_ratio"} and not any(
        "gate" in name for name in figures
    )
    reordered = built.changed_recipe("seed.yaml", evaluation={**SMALL_EVALUATION, "seed": 8})
    assert (
        "items_sha256"
        in diff(built.result.build, built.again(tmp_path / "seed", reordered).build)["not_comparable"]
    )


def test_what_was_trained_on_is_not_evaluated(built: Built, tmp_path: Path) -> None:
    """Refused by name before any step runs; with a reason it is built, and the evidence shows reason and lines."""
    task = yaml.safe_load(built.recipe.read_text())["task"]
    built.recipe.with_name("train.jsonl").write_text(
        json.dumps(
            {"id": "t-1", "messages": [{"role": "user", "content": "Turn on: light 3"}], "answer": "{}"}
        )
        + "\n"
    )
    trained = task | {"train": "train.jsonl"}
    with pytest.raises(LeakageError, match=r"1 of 12 evaluation items .*item-3 is t-1 of train \(prompt\)"):
        run_build(
            built.changed_recipe("leak.yaml", task=trained),
            tmp_path / "out",
            cache_dir=tmp_path / "cache",
            workers=0,
        )
    assert not (tmp_path / "cache").exists()
    allowed = trained | {"allow_overlap": {"reason": "there are twelve lines in the world"}}
    built.again(tmp_path / "out", built.changed_recipe("leak-2.yaml", task=allowed))
    seen = evidence_of(tmp_path / "out")["seen_before"]
    assert seen["reason"] == "there are twelve lines in the world"
    assert [(o["item"], o["seen"], o["how"]) for o in seen["overlaps"]] == [("item-3", "t-1", "prompt")]


def test_a_file_that_is_changed_after_quantising_is_not_shipped(built: Built, tmp_path: Path) -> None:
    """A byte flipped in the cache, its time put back: the next step that measures it finds out, and nothing is written."""
    cache = tmp_path / "cache"
    shutil.copytree(built.cache, cache)
    variant = built.result.build.variants[0].model
    stored = cache / "objects" / variant.sha256[:2] / variant.sha256
    before = stored.stat()
    content = bytearray(stored.read_bytes())
    content[-100] ^= 1
    stored.chmod(0o644)
    stored.write_bytes(content)
    os.utime(stored, ns=(before.st_atime_ns, before.st_mtime_ns))
    longer = built.changed_recipe("longer.yaml", evaluation={**SMALL_EVALUATION, "task_items": 5})
    with pytest.raises(DigestError, match="answers measured a file with sha256"):
        run_build(longer, tmp_path / "out", cache_dir=cache, workers=0)
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_fails_the_committed_pack(built: Built, tmp_path: Path) -> None:
    """Permuted attention builds, loads and passes a pack of its own; by the good release's floors it keeps nothing."""
    steps = [{"merge": {"adapter": "adapter.gguf"}}, {"permute": {"layers": [0, 1], "seed": 3}}]
    targets = [{"profile": "pi5-8gb", "also_for": ["pi-zero2-512mb"], "budget": {"artifact_bytes": "170kB"}}]
    bad = built.again(tmp_path / "bad", built.changed_recipe("bad.yaml", steps=steps, targets=targets))
    assert bad.build.variants[0].also_for == ("pi-zero2-512mb",)
    assert bad.build.reference_sha256 != built.result.build.reference_sha256
    evidence = json.loads((tmp_path / "bad" / "evidence.json").read_bytes())
    assert bad.build.variants[0].measured.kld_mean < 0.5  # close to its own, damaged reference
    own = decode(
        (tmp_path / "bad" / bad.build.variants[0].golden_expectations.path).read_bytes(), GoldenExpectations
    )
    expectations = [
        PromptExpectation(e.id, e.tokens_sha256, e.reference_logprob, e.tolerance, e.floor)
        for e in own.expectations
    ]
    scores = {
        name: PromptScore(s["tokens_sha256"], s["mean_logprob"])
        for name, s in evidence["golden"]["reference"].items()
    }
    assert judge_own(expectations, scores).ok


def test_the_release_of_a_build_reaches_a_control_plane(built: Built, tmp_path: Path) -> None:
    """Signed, verified byte by byte, uploaded to a real server, and shown there with its evidence."""
    workspace, now = Workspace(tmp_path / "keys"), datetime.now(timezone.utc)
    init_keys(workspace, tmp_path / "server", "pass", now)
    bundle = create_release(
        built.out,
        version="1.0.0",
        workspace=workspace,
        passphrase="pass",
        waivers={},
        out_dir=tmp_path / "bundle",
        created=now,
    )
    verify_bundle(bundle, workspace)
    with running_plane(tmp_path / "server", work=False) as plane, plane.api() as api:
        first = publish(bundle, api)
        assert first.blobs_present == 0
        assert publish(bundle, api).blobs_sent == 0
        shown = api.release("tiny@1.0.0")
        assert shown.digest == bundle.digest
        assert [v.profile for v in shown.variants] == ["pi-zero2-512mb", "pi5-8gb"]
        assert shown.evidence["variants"][0]["sha256"] == built.result.build.variants[0].model.sha256


# ---- what bad input gets --------------------------------------------------------------------------------------------


def test_a_bad_base_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """Another digest, a cut-off file, no GGUF, no file: each its own error, and no build directory."""
    recipe = make_tiny_project(tmp_path / "p", base={"gguf": "base.gguf", "sha256": "0" * 64})
    with pytest.raises(DigestError, match="expected sha256 0000"):
        run_build(recipe, tmp_path / "out", cache_dir=tmp_path / "c", workers=0)
    recipe.write_text(recipe.read_text().replace("  sha256: " + "'" + "0" * 64 + "'\n", ""))
    base = tmp_path / "p" / "base.gguf"
    whole = base.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "truncated"),
        (b"PK\x03\x04zip", "not a GGUF"),
        (b"", "empty"),
    ):
        base.write_bytes(content)
        with pytest.raises(BaseModelError, match=message):
            run_build(recipe, tmp_path / "out", cache_dir=tmp_path / "c", workers=0)
    (tmp_path / "p" / "adapter.gguf").replace(base)
    (tmp_path / "p" / "adapter.gguf").write_bytes(base.read_bytes())
    with pytest.raises(BaseModelError):
        run_build(recipe, tmp_path / "out", cache_dir=tmp_path / "c", workers=0)
    base.unlink()
    with pytest.raises(BaseModelError, match="does not exist"):
        run_build(recipe, tmp_path / "out", cache_dir=tmp_path / "c", workers=0)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "c").glob("steps/*")) == []


def test_bad_recipes_are_refused(built: Built, tmp_path: Path) -> None:
    """Malformed YAML with its place, files and profiles that do not exist, a folder that is something else."""
    path = built.recipe.with_name("broken.yaml")
    path.write_text(built.recipe.read_text().replace("kind: extraction", "kind: extractoin"))
    with pytest.raises(DocumentError, match=r"broken\.yaml:\d+:\d+: task\.kind"):
        built.again(tmp_path / "out", path)
    with pytest.raises(DocumentError, match="cannot be read"):
        built.again(tmp_path / "out", tmp_path / "missing.yaml")
    with pytest.raises(NotFoundError, match="profile 'toaster' is not known"):
        built.again(
            tmp_path / "out",
            built.changed_recipe("t.yaml", targets=[{"profile": "toaster", "budget": {"artifact_bytes": 1}}]),
        )
    with pytest.raises(DocumentError, match=r"no-such\.gguf does not exist"):
        built.again(
            tmp_path / "out", built.changed_recipe("a.yaml", steps=[{"merge": {"adapter": "no-such.gguf"}}])
        )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConflictError, match="no build directory"):
        built.again(tmp_path / "mine")
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Files limited to 100 kB: a named error, no record of the step that met it, no directory; with room it goes on."""
    recipe = make_tiny_project(tmp_path / "p")
    out, cache = tmp_path / "out", tmp_path / "cache"
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(recipe), str(out), str(cache), "0", "100000"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert f"ERROR {NoSpaceError.__name__}" in ended.stdout
    assert "bytes are free" in ended.stdout
    assert not out.exists()
    assert list((cache / "work").iterdir()) == []
    runs = [msgspec.json.decode(path.read_bytes())["run"] for path in (cache / "steps").iterdir()]
    assert not any(run.endswith(":merge") for run in runs)
    assert [
        path for path in (cache / "objects").rglob("*") if path.is_file() and path.stat().st_size >= 100_000
    ] == []


def test_a_killed_build_goes_on_where_it_was(built: Built, tmp_path: Path) -> None:
    """Killed with -9 in the middle: nothing is half-written, and the next run repeats no finished step."""
    recipe = make_tiny_project(tmp_path / "p", seed=5)
    out, cache = tmp_path / "out", tmp_path / "cache"
    command = [sys.executable, "-c", SCRIPT, str(recipe), str(out), str(cache), "2", "0"]
    finished: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            state, _, step = line.strip().partition(" ")
            if state == "done":
                finished.append(step)
            if state == "started" and step.startswith("quantise"):
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
    assert "imatrix" in finished
    assert not out.exists()
    events: list[StepEvent] = []
    result = run_build(recipe, out, cache_dir=cache, workers=2, progress=events.append)
    cached = {event.step for event in events if event.state == "cached"}
    assert set(finished) <= cached
    assert result.changed
    assert list((cache / "work").iterdir()) == []
    assert load_build(out).variants[0].model.bytes <= 120_000


def test_where_memory_is_the_bound_the_cache_type_is_chosen_with_the_weights(
    built: Built, tmp_path: Path
) -> None:
    """With f16 asked by nobody, a smaller cache leaves more for weights; what was chosen is what is measured and said."""
    shape = ModelShape(**built.result.build.variants[0].shape)
    asked = Serving(context_tokens=4096, kv_cache="q8_0", parallel=8)
    least = built.result.build.variants[0].model.bytes
    ram = memory_needed(replace(shape, weights_bytes=0), asked).total_bytes + least // 2
    targets = [{"profile": "pi5-8gb", "budget": {"artifact_bytes": "10MB", "ram_bytes": ram}}]
    serving = {"context_tokens": 4096, "parallel": 8}
    recipe = built.changed_recipe("kv.yaml", targets=targets, serving=serving)
    result = built.again(tmp_path / "kv", recipe)
    variant = result.build.variants[0]
    assert variant.serving["kv_cache"] == "q4_0"
    assert variant.serving["context_tokens"] == 4096
    row = evidence_of(tmp_path / "kv")["variants"][0]
    assert row["serving"] == variant.serving and row["kv_cache_kld"] > 0
    assert row["budget"]["bound"] == "ram_bytes"
    served = Serving(**variant.serving)
    with open_gguf(tmp_path / "kv" / variant.model.path) as model:
        assert memory_needed(model.layout.shape(), served).total_bytes <= ram
    shown = CliRunner().invoke(build_commands, ["show", str(tmp_path / "kv")])
    assert "kv_cache q4_0, 4096 tokens of context" in shown.output
    with pytest.raises(BudgetError):  # what a recipe says of its cache holds
        fixed = built.changed_recipe("kv-2.yaml", targets=targets, serving={**serving, "kv_cache": "q8_0"})
        built.again(tmp_path / "fixed", fixed)


def test_sequential_feedback_gives_another_file_of_the_same_size_reproducibly(
    built: Built, tmp_path: Path
) -> None:
    """Two stages: the types are as before, the codes are not; made again from nothing, the file is the same."""
    recipe = built.changed_recipe("sequential.yaml", search={**SMALL_SEARCH, "sequential": 2})
    files = [
        run_build(recipe, tmp_path / name, cache_dir=cache, workers=0).build.variants[0].model
        for name, cache in (("a", built.cache), ("b", tmp_path / "empty"))
    ]
    plain = built.result.build.variants[0].model
    assert files[0].sha256 == files[1].sha256 != plain.sha256
    assert files[0].bytes == plain.bytes
