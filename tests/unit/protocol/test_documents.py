"""YAML documents: what is read, and for every mistake the file, the line, the column and what was expected."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from slmops.core.device.fit import Serving as FitServing
from slmops.core.errors import DocumentError
from slmops.core.evidence.gates import BinaryGate, ContinuousGate, PairedGate
from slmops.core.rollout.judge import Deadlines
from slmops.core.rollout.machine import Policy
from slmops.core.rollout.plan import InFlight, WaveSpec
from slmops.core.rollout.selector import parse_selector
from slmops.protocol.documents import Blueprint, Profile, Recipe, json_schema, load_documents, load_one

RECIPE = """\
apiVersion: slmops/v1
kind: Recipe
metadata: {name: home-intents}
base: {gguf: models/base.gguf}
task: {kind: extraction, eval: data/eval.jsonl, calibration: data/calibration.txt}
steps:
  - merge: {adapter: adapter.gguf}
targets:
  - {profile: pi5-8gb, budget: {artifact_bytes: 85MB, ram_bytes: 400MiB, decode_tps: 15}}
  - {profile: n100-16gb, budget: {artifact_bytes: 120000000}}
gates:
  - {metric: task.exact_match, max_drop: 2%, min: 0.60, confidence: 0.95}
  - {metric: kld.mean, max: 0.05}
"""
BLUEPRINT = """\
apiVersion: slmops/v1
kind: Blueprint
metadata: {name: home-assistant}
selector: "profile in (pi5-8gb, n100-16gb) and site != lab"
model: {name: home-intents, channel: stable}
serving: {context_tokens: 2048, kv_cache: q8_0, system_prompt: default}
rollout:
  waves: [{selector: "canary = always", max_failures: 0}, {limit: 1%, min_devices: 5}, {limit: 7}, {dynamic: true}]
  max_in_flight: {start: 5, growth: 2, max: 500}
  bake: {min_s: 600, max_s: 86400}
  deadlines: {acknowledge_s: 259200, update_s: 21600}
  budget: {group_by: site, max_unavailable: 1}
  holdback_ratio: 5%
  gates:
    - {metric: device.failed, kind: binary, p0: 0.02, p1: 0.10, alpha: 0.05}
    - {metric: golden.pass, kind: paired, max_drop: 0.02}
    - {metric: decode_tps, kind: continuous, direction: decrease, allowed_ratio: 0.9, critical_ratio: 0.7}
  approvals: 1
  on_abort: hold
"""
PROFILE = """\
apiVersion: slmops/v1
kind: DeviceProfile
metadata: {name: pi4-4gb}
arch: aarch64
ram_bytes: 1GiB
disk_bytes: 4GB
cores: 4
memory_bandwidth_bytes_s: 4GB
compute_flops: 30000000000
"""


# ---- what is read ----------------------------------------------------------------------------------------------


def test_a_recipe() -> None:
    recipe = load_one(RECIPE, "recipe.yaml", Recipe)
    assert recipe.metadata.name == "home-intents"
    assert [target.budget.artifact_bytes for target in recipe.targets] == [85_000_000, 120_000_000]
    assert recipe.targets[0].budget.ram_bytes == 400 << 20
    assert recipe.gates[0].max_drop == pytest.approx(0.02)
    assert recipe.steps[0].merge is not None and recipe.steps[0].merge.scale == 1.0


def test_a_blueprint_becomes_what_the_core_works_with() -> None:
    blueprint = load_one(BLUEPRINT, "blueprint.yaml", Blueprint)
    rollout = blueprint.rollout
    assert rollout.policy() == Policy(4, 1, 600, 86_400, "hold")
    assert rollout.in_flight() == InFlight(5, 2.0, 500)
    assert rollout.silence() == Deadlines(259_200, 21_600)
    assert [wave.spec() for wave in rollout.waves] == [
        WaveSpec(selector=parse_selector("canary = always"), max_failures=0),
        WaveSpec(limit_ratio=0.01, min_devices=5),
        WaveSpec(limit_devices=7),
        WaveSpec(dynamic=True),
    ]
    assert [gate.gate() for gate in rollout.gates] == [
        BinaryGate("device.failed", 0.02, 0.10, 0.05),
        PairedGate("golden.pass", 0.02),
        ContinuousGate("decode_tps", "decrease", 0.9, 0.7),
    ]
    assert rollout.holdback_ratio == pytest.approx(0.05)
    assert blueprint.serving.for_fit() == FitServing(2048, "q8_0", 2, 64)


def test_defaults_are_safe() -> None:
    """Few lines are enough: a canary wave without tolerance, both standard gates, and a revert of everything."""
    text = BLUEPRINT.split("serving:", maxsplit=1)[0]
    rollout = load_one(text, "b.yaml", Blueprint).rollout
    assert rollout.waves[0].max_failures == 0
    assert [gate.gate() for gate in rollout.gates] == [
        BinaryGate("device.failed", 0.02, 0.1),
        PairedGate("golden.pass", 0.0),
    ]
    assert rollout.on_abort == "revert_all"


def test_a_profile() -> None:
    profile = load_one(PROFILE, "profile.yaml", Profile).profile()
    assert (profile.name, profile.ram_bytes, profile.memory_bandwidth_bytes_s) == (
        "pi4-4gb",
        1 << 30,
        4 * 10**9,
    )


def test_several_documents_in_one_file() -> None:
    text = f"{RECIPE}---\n{BLUEPRINT}---\n{PROFILE}"
    assert [type(document) for document in load_documents(text, "all.yaml")] == [Recipe, Blueprint, Profile]
    assert load_one(text, "all.yaml", Blueprint).metadata.name == "home-assistant"


def test_a_quick_look_asks_the_same_of_less() -> None:
    """Never more than the recipe asks for, and never nothing."""
    evaluation = load_one(RECIPE, "r.yaml", Recipe).evaluation
    fast = evaluation.fast()
    assert (fast.seed, fast.golden_prompts) == (evaluation.seed, evaluation.golden_prompts)
    assert 0 < fast.text_tokens < evaluation.text_tokens
    assert 0 < fast.task_items < evaluation.task_items
    small = load_one(RECIPE + "evaluation: {task_items: 3, text_tokens: 64}\n", "r.yaml", Recipe).evaluation
    assert (small.fast().task_items, small.fast().text_tokens) == (3, 64)
    everything = load_one(RECIPE + "evaluation: {task_items: 0}\n", "r.yaml", Recipe).evaluation
    assert everything.fast().task_items == fast.task_items


def test_anchors_and_merges_are_plain_yaml() -> None:
    text = RECIPE.replace("budget: {artifact_bytes: 120000000}", "budget: *b").replace(
        "budget: {artifact_bytes: 85MB", "budget: &b {artifact_bytes: 85MB"
    )
    recipe = load_one(text, "r.yaml", Recipe)
    assert recipe.targets[1].budget == recipe.targets[0].budget
    merged = RECIPE.replace("gates:\n", "gates:\n  - &g {metric: perplexity, max: 9}\n  - {<<: *g, min: 1}\n")
    assert load_one(merged, "r.yaml", Recipe).gates[1].max == 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("85MB", 85_000_000),
        ("85 MB", 85_000_000),
        ("1.5GiB", 3 << 29),
        ("0.1GB", 100_000_000),
        ("512KiB", 512 << 10),
        ("7", 7),
        ("7B", 7),
        ("'9'", 9),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    recipe = load_one(RECIPE.replace("85MB", text), "r.yaml", Recipe)
    assert recipe.targets[0].budget.artifact_bytes == expected


# ---- mistakes --------------------------------------------------------------------------------------------------


def mistake(text: str, source: str = "f.yaml") -> list[str]:
    with pytest.raises(DocumentError) as caught:
        load_documents(text, source)
    assert caught.value.hint
    return caught.value.message.split("\n")


BAD = Path(__file__).parent / "bad_documents"


@pytest.mark.parametrize("path", sorted(BAD.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_mistake_has_its_place(path: Path) -> None:
    """Each file says in its first lines (``# expect:``) exactly what its reader must be told."""
    text = path.read_text(encoding="utf-8")
    expected = [
        line.removeprefix("# expect: ") for line in text.splitlines() if line.startswith("# expect: ")
    ]
    assert expected
    assert mistake(text, path.name) == expected


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "apiVersion: slmops/v1",
            "apiVersion: slmops/v2",
            "f.yaml:1:13: apiVersion is 'slmops/v2', expected 'slmops/v1'",
        ),
        ("apiVersion: slmops/v1\n", "", "f.yaml:1:1: apiVersion is None, expected 'slmops/v1'"),
        (
            "kind: Recipe",
            "kind: Recipee",
            "f.yaml:2:7: kind is 'Recipee', expected one of Recipe, DeviceProfile, Blueprint",
        ),
        ("kind: Recipe", "kind: [Recipe]", "f.yaml:2:7: kind is ['Recipe'], expected one of"),
        ("name: home-intents", "name: ../x", "f.yaml:3:18: metadata.name: String should match pattern"),
        ("85MB", "85 megs", "f.yaml:9:49: targets.0.budget.artifact_bytes: '85 megs' is not a size"),
        (
            "85MB",
            "-1",
            "f.yaml:9:49: targets.0.budget.artifact_bytes: Input should be greater than 0 (found -1)",
        ),
        ("85MB", "9" * 30, "f.yaml:9:49: targets.0.budget.artifact_bytes: Input should be less than"),
        ("85MB", "'" + "9" * 400 + "MB'", "is not a size"),
        (
            "2%",
            "200%",
            "f.yaml:12:42: gates.0.max_drop: Input should be less than or equal to 1 (found '200%')",
        ),
        ("2%", "x%", "f.yaml:12:42: gates.0.max_drop: 'x%' is not a percentage"),
        ("max: 0.05", "max: .nan", "f.yaml:13:29: gates.1.max: Input should be a finite number"),
        ("max: 0.05", "maxx: 0.05", "f.yaml:13:24: gates.1.maxx: is not a known field here"),
        (", max: 0.05", "", "f.yaml:13:5: gates.1: gate kld.mean has neither max_drop, min nor max"),
        ("base: {gguf: models/base.gguf}", "base: {}", "f.yaml:4:7: base: give exactly one of gguf"),
        ("n100-16gb", "pi5-8gb", "f.yaml:1:1: document: two targets have the same profile and runtime"),
        (
            "decode_tps: 15",
            "decode_tps: .inf",
            "targets.0.budget.decode_tps: Input should be a finite number",
        ),
        ("merge: {adapter", "mergee: {adapter", "f.yaml:7:5: steps.0.mergee: is not a known field here"),
        (
            "merge: {adapter: adapter.gguf}",
            "{}",
            "f.yaml:7:5: steps.0: a step has exactly one key of merge, permute",
        ),
        ("max: 0.05", "max_drop: 1%", "f.yaml:13:5: gates.1: gate kld.mean: max_drop is for task metrics"),
        ("steps:", "serving: {kv_cache: q9}\nsteps:", "f.yaml:6:10: serving: kv_cache 'q9' is not known"),
        ("targets:\n", "targets:\n  - 5\n", "f.yaml:9:5: targets.0: Input should be a valid dictionary"),
        (
            "metadata: {name: home-intents}",
            "metadata: [a]",
            "f.yaml:3:11: metadata: Input should be a valid dictionary",
        ),
    ],
)
def test_mistakes_in_a_recipe(before: str, after: str, message: str) -> None:
    assert before in RECIPE
    assert any(message in line for line in mistake(RECIPE.replace(before, after, 1)))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "site != lab",
            "site !! lab",
            "f.yaml:4:11: selector: selector 'profile in (pi5-8gb, n100-16gb) and site !! lab'",
        ),
        (
            "channel: stable",
            "channel: stable, version: 1.0.0",
            "f.yaml:5:8: model: give exactly one of channel and version",
        ),
        ("kv_cache: q8_0", "kv_cache: q9", "f.yaml:6:10: serving: kv_cache 'q9' is not known"),
        (
            "context_tokens: 2048",
            "context_tokens: many",
            "f.yaml:6:27: serving.context_tokens: Input should be a valid integer",
        ),
        ("limit: 1%", "limit: 1", ""),
        ("limit: 1%", "limit: lots", "rollout.waves.1.limit: limit 'lots': write 10% or a number of devices"),
        ("limit: 1%", "limit: 0%", "rollout.waves.1.limit: limit '0%' is not between"),
        ("limit: 1%", "limit: nan%", "rollout.waves.1.limit: limit 'nan%' is not between"),
        ("limit: 1%", "limit: x%", "rollout.waves.1.limit"),
        ("limit: 7", "limit: [7]", "f.yaml:8:96: rollout.waves.2.limit: Input should be a valid string"),
        ("limit: 7", "limit: 0", "rollout.waves.2.limit: limit 0: a wave needs at least one device"),
        (
            "canary = always",
            "canary ~ always",
            "f.yaml:8:22: rollout.waves.0.selector: selector 'canary ~ always'",
        ),
        ("p1: 0.10", "p1: 0.01", "f.yaml:15:7: rollout.gates.0: gate device.failed: needs 0 < p0 < p1 < 1"),
        ("direction: decrease, ", "", "rollout.gates.2: gate decode_tps: continuous needs direction"),
        ("critical_ratio: 0.7", "critical_ratio: 0.95", "contradict direction decrease"),
        (
            "holdback_ratio: 5%",
            "holdback_ratio: 60%",
            "rollout.holdback_ratio: Input should be less than or equal to 0.5",
        ),
        (
            "on_abort: hold",
            "on_abort: panic",
            "f.yaml:19:13: rollout.on_abort: Input should be 'hold', 'revert_uncommitted' or 'revert_all'",
        ),
        ("approvals: 1", "approvals: -1", "rollout.approvals: Input should be greater than or equal to 0"),
    ],
)
def test_mistakes_in_a_blueprint(before: str, after: str, message: str) -> None:
    assert before in BLUEPRINT
    changed = BLUEPRINT.replace(before, after, 1)
    if not message:
        load_documents(changed, "f.yaml")
        return
    assert any(message in line for line in mistake(changed))


def test_every_mistake_is_told_at_once() -> None:
    lines = mistake(
        RECIPE.replace("85MB", "big").replace("2%", "x%").replace("kind: extraction", "kind: chat")
    )
    assert [line.split(":")[1] for line in lines] == ["5", "9", "12"]


def test_a_required_field_is_missed_at_its_parent() -> None:
    assert mistake(RECIPE.replace("name: home-intents", "labels: {}")) == [
        "f.yaml:3:11: metadata.name: is required"
    ]
    assert mistake(RECIPE.replace("eval: data/eval.jsonl, ", "")) == [
        "f.yaml:5:7: task: give examples: FILE (it is split for you), or both eval: FILE and calibration: FILE"
    ]


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_an_empty_file_says_how_to_begin(text: str) -> None:
    assert mistake(text) == ["f.yaml:1:1: empty, expected a document"]


@pytest.mark.parametrize(
    ("text", "place"), [("[1, 2]", "1:1"), ("words", "1:1"), ("\n 5", "2:2"), ("---\n", "2:1")]
)
def test_what_is_no_mapping_says_what_was_expected(text: str, place: str) -> None:
    assert mistake(text) == [f"f.yaml:{place}: expected a mapping with apiVersion and kind"]


def test_the_wrong_kind_or_number_of_documents() -> None:
    with pytest.raises(DocumentError, match="has 0 documents of kind Blueprint, expected one"):
        load_one(RECIPE, "f.yaml", Blueprint)
    with pytest.raises(DocumentError, match="has 2 documents of kind Recipe, expected one"):
        load_one(f"{RECIPE}---\n{RECIPE}", "f.yaml", Recipe)

    class Other(BaseModel):
        pass

    with pytest.raises(DocumentError, match="kind Other"):
        load_one(RECIPE, "f.yaml", Other)


def test_mistakes_in_the_second_document_have_their_line_in_the_file() -> None:
    text = f"{RECIPE}---\n{RECIPE.replace('85MB', 'big')}"
    assert mistake(text)[0].startswith("f.yaml:23:49: ")


# ---- attacks ---------------------------------------------------------------------------------------------------


def test_a_billion_laughs_is_read_once_and_refused() -> None:
    """Aliases of aliases: looked at as often as they are written, not as often as they unfold."""
    lines = ["a: &a [x]"] + [
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]" for n in range(20)
    ]
    assert "apiVersion is None" in mistake("\n".join(lines))[0]


def test_an_alias_that_contains_itself() -> None:
    assert mistake("apiVersion: slmops/v1\nkind: Recipe\nbase: &b {gguf: *b}\n") == [
        "f.yaml:3:7: contains itself"
    ]


def test_nesting_beyond_reason() -> None:
    assert mistake("[" * 50_000) == ["f.yaml:1:1: nested too deeply"]


def test_a_huge_file_is_not_parsed() -> None:
    assert mistake("#" * ((4 << 20) + 1)) == ["f.yaml: 4194305 bytes, 4194304 are allowed"]


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [id]", "!unknown x", "!!binary '???'"])
def test_tags_execute_nothing(tag: str) -> None:
    line = mistake(RECIPE.replace("models/base.gguf", tag))[0]
    assert line.startswith("f.yaml:4:14: ")


# ---- published schemas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text"), [("Recipe", RECIPE), ("Blueprint", BLUEPRINT), ("DeviceProfile", PROFILE)]
)
def test_the_published_schema_accepts_what_we_accept(kind: str, text: str) -> None:
    """An editor must not underline ``85MB`` or ``10%``, and must underline a typo."""
    schema = json_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(yaml.safe_load(text))
    assert not validator.is_valid({**yaml.safe_load(text), "typo": 1})


def test_the_examples_of_the_repository_are_valid() -> None:
    root = Path(__file__).parents[3]
    found = sorted(path for path in (root / "examples").rglob("*.yaml"))
    for path in found:
        text = path.read_text(encoding="utf-8")
        if "apiVersion: slmops/" in text:
            load_documents(text, str(path))


def test_the_document_of_the_design_reads_as_text(tmp_path: Path) -> None:
    """Windows line ends and a byte-order mark are no mistakes."""
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + dedent(RECIPE).replace("\n", "\r\n").encode())
    assert load_one(path.read_text(encoding="utf-8"), "r.yaml", Recipe) == load_one(RECIPE, "r.yaml", Recipe)
