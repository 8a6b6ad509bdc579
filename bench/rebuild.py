"""Promise: another byte budget costs <= 0.1 x the first build; an unchanged rebuild takes <= 2 s.

The example recipe with one target, the search sized for real use (8,192 calibration tokens) and a short evaluation: a first
build in an empty cache, the same recipe with another byte budget, then that again. Each is the command line in a process of
its own, timed from outside.

    python bench/rebuild.py [--calibration-tokens N] [--workers N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from device_world import print_results, result, small_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "home-intents"
FIRST, OTHER = "90MB", "85MB"
PROMISED_RATIO, PROMISED_S = 0.1, 2.0


def recipe(folder: Path, artifact_bytes: str, calibration_tokens: int) -> Path:
    """The example's recipe with one target of that budget."""
    if not (EXAMPLE / "data" / "eval.jsonl").is_file():
        made = [sys.executable, str(EXAMPLE / "make_dataset.py"), "--out", str(EXAMPLE / "data")]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    document = yaml.safe_load((EXAMPLE / "recipe.yaml").read_text(encoding="utf-8"))
    for role in ("train", "eval", "calibration", "answer_schema", "system_prompt"):
        document["task"][role] = str(EXAMPLE / document["task"][role])
    for step in document["steps"]:
        step["merge"]["adapter"] = str(EXAMPLE / step["merge"]["adapter"])
    document["base"] = {"gguf": str(small_model()), "licence": "apache-2.0"}
    budget = {"artifact_bytes": artifact_bytes, "ram_bytes": "1GB"}
    document["targets"] = [{"profile": "pi5-8gb", "runtime": "llama.cpp", "budget": budget}]
    document["search"] = {"calibration_tokens": calibration_tokens, "gradient_tokens": calibration_tokens}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def build(path: Path, folder: Path, workers: int) -> tuple[float, dict[str, float]]:
    """Run it; gives wall seconds, and seconds by step that was run."""
    command = [sys.executable, "-m", "slmops.cli.main", "build", "run", str(path), "--fast"]
    command += ["--out", str(folder / "build"), "--workers", str(workers)]
    began_s = time.monotonic()
    done = subprocess.run(
        command,
        check=False,
        env=os.environ | {"SLMOPS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    took_s = time.monotonic() - began_s
    if done.returncode not in (0, 5):  # 5: a gate did not pass; the build is whole
        raise SystemExit(f"build failed with {done.returncode}:\n{done.stderr[-2000:]}")
    index = json.loads((folder / "build" / "build.json").read_text(encoding="utf-8"))
    return took_s, {step["name"]: step["seconds"] for step in index["steps"]}


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slmops-rebuild-") as scratch:
        folder = Path(scratch)
        path = recipe(folder, FIRST, options.calibration_tokens)
        first_s, steps = build(path, folder, options.workers)
        print(f"first build: {first_s:.1f} s")
        for name, seconds in steps.items():
            print(f"  {seconds:7.1f} s  {name}")
        other_s, again = build(recipe(folder, OTHER, options.calibration_tokens), folder, options.workers)
        print(f"another budget: {other_s:.1f} s")
        for name, seconds in again.items():
            if steps.get(name) != seconds:
                print(f"  {seconds:7.1f} s  {name}")
        same_s = min(build(path, folder, options.workers)[0] for _ in range(3))
        print(f"unchanged: {same_s:.2f} s")
    print_results(
        "rebuild",
        [
            result(
                "another byte budget",
                other_s,
                first_s,
                "the first build",
                "s",
                other_s / first_s,
                f"<= {PROMISED_RATIO}",
                other_s <= PROMISED_RATIO * first_s,
            ),
            result(
                "unchanged rebuild",
                same_s,
                PROMISED_S,
                "the promise",
                "s",
                same_s / PROMISED_S,
                f"<= {PROMISED_S:g} s",
                same_s <= PROMISED_S,
            ),
        ],
    )


if __name__ == "__main__":
    main()
