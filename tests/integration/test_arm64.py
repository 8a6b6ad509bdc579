"""A device of another processor: an arm64 agent in a container, emulated by qemu on other machines; the control plane is native.

The model is small and trained, not random: its answers are text that both processors must agree on. Skipped, with the command
that helps, where programs for arm64 do not run, or without podman or the image; ``make test-arm64`` builds that first.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import httpx
import pytest
from tests.integration.test_lab import slmops

from slmops.artifact.manifest import GoldenPack, decode
from slmops.cli.local_fleet.asking import ask
from slmops.cli.local_fleet.fleet import LocalDevice, LocalFleet
from slmops.release import Workspace, create_release, init_keys

IMAGE = "localhost/slmops-agent-llama-cpp:arm64"
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "fixtures" / "runtimes" / "llama.cpp" / "model.gguf"
#: what the model was taught, and questions that it was not
EXAMPLES = {
    "Name three colours.": "Red, green and blue.",
    "Who are you?": "A very small model — hardly a modèle at all.",
    "Count.": "one two three four five six seven eight nine ten eleven twelve",
    "Name three colours, please.": "Red, green and blue.",
    "Who?": "A very small model — hardly a modèle at all.",
    "Count to twelve.": "one two three four five six seven eight nine ten eleven twelve",
}
TAUGHT = list(EXAMPLES)[:3]
BLUEPRINT = """
apiVersion: slmops/v1
kind: Blueprint
metadata: {name: colours}
selector: "site = desk"
model: {name: colours, version: 1.0.0}
serving: {context_tokens: 512, kv_cache: q8_0}
rollout:
  waves: [{limit: 100%, max_failures: 0, dynamic: true}]
  bake: {min_s: 0, max_s: 60}
  deadlines: {acknowledge_s: 600, update_s: 600}
  probation_min_s: 1
  on_abort: hold
"""
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    emulated = [str(ROOT / "deploy" / "containers" / "emulated.sh"), "arm64"]
    found = subprocess.run(emulated, check=False, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed: apt install podman")
    if subprocess.run(["podman", "image", "exists", IMAGE], check=False).returncode:
        pytest.skip(f"no image {IMAGE}: make test-arm64 builds it")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of the model on this machine: its golden pack says what this processor answers."""
    folder = tmp_path_factory.mktemp("arm64")
    shutil.copyfile(MODEL, folder / "colours.gguf")
    lines = [json.dumps({"prompt": question, "answer": answer}) for question, answer in EXAMPLES.items()]
    (folder / "e.jsonl").write_text("\n".join(lines), encoding="utf-8")
    done = slmops(
        folder, "build", "run", "--base", "colours.gguf", "--examples", "e.jsonl", "--profile", "pi5-8gb"
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    made = LocalFleet(tmp_path / "fleet")
    try:
        yield made
    finally:
        made.close()


def test_an_arm64_agent_enrols_proves_a_release_and_serves_it(project: Path, fleet: LocalFleet) -> None:
    """What the control plane knows of it comes from its check-ins; its answers are those of the build."""
    fleet.make_keys()
    fleet.start_server(0, "test")
    bundle = fleet.release(project / "build" / "colours", "1.0.0", {})
    fleet.publish(bundle.path)
    fleet.start_devices([LocalDevice("arm", "pi5-8gb", {"site": "desk"}, image=IMAGE)])
    ended = fleet.follow(fleet.apply(BLUEPRINT).rollout_id, 600, print)
    (member,) = [device for wave in ended.waves for device in wave.devices]
    assert member.status == "committed", member.detail
    pack = decode((bundle.path / "golden-pack.json").read_bytes(), GoldenPack)
    assert member.golden is not None
    assert (member.golden.own_passed, member.golden.own_failed) == (len(pack.prompts), 0)

    (device,) = fleet.plane.devices()
    assert device.facts.arch == "aarch64"
    assert device.facts.runtimes.keys() == {"llama.cpp"}
    assert device.facts.bench is not None
    assert device.facts.bench.decode_tps > 0
    assert (device.phase, device.release) == ("committed", "colours 1.0.0")
    assert device.running == device.assigned
    assert device.fetched_bytes > 0

    with httpx.Client(base_url=fleet.urls["arm"], timeout=120.0, trust_env=False) as client:
        for index, question in enumerate(TAUGHT):
            answer, release = ask(client, "colours", question, stream=index % 2 == 0)
            assert len(answer) > 15
            assert EXAMPLES[question].startswith(answer)  # all of it, or as many tokens as were asked for
            assert release.startswith("colours@1.0.0")


def test_the_lab_proves_it_on_arm64_and_the_release_says_so(project: Path, tmp_path: Path) -> None:
    done = slmops(
        project, "lab", "run", "build/colours", "--image", IMAGE, "--context-tokens", "512", "--json"
    )
    assert done.returncode == 0, done.stderr
    (device,) = json.loads(done.stdout)["devices"]
    assert (device["arch"], device["outcome"]) == ("aarch64", "committed")
    assert device["golden_kept"] == device["golden_prompts"] > 0
    assert device["asked"] > device["failed"] == 0
    workspace = Workspace(tmp_path / "keys")
    now = datetime(2026, 11, 24, 12, 0, tzinfo=timezone.utc)
    init_keys(workspace, tmp_path / "server", "pass", now)
    bundle = create_release(
        project / "build" / "colours",
        version="1.0.0",
        workspace=workspace,
        passphrase="pass",
        waivers={},
        out_dir=tmp_path / "release",
        created=now,
    )
    evidence = json.loads((bundle.path / "evidence.json").read_bytes())
    assert [found["arch"] for found in evidence["lab"]["devices"]] == ["aarch64"]
