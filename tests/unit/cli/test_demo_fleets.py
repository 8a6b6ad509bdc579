"""Which devices a demo has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slmops.cli.demo.fleets import USUAL, find_environments, fleet_for, stock_server, write_external_config
from slmops.core.errors import NotFoundError, UsageError
from slmops.protocol.documents import load_documents
from slmops.protocol.documents.blueprint import Blueprint
from slmops.protocol.documents.recipe import Recipe
from slmops.runtimes.environments import VARIABLE
from slmops.runtimes.external.config import read_config

ROOT = Path(__file__).parents[3]


def test_one_device_for_each_runtime_and_llama_cpp_first() -> None:
    assert fleet_for("") is USUAL
    everything = fleet_for("all")
    assert [m.runtime for m in everything.members][:2] == ["llama.cpp", "external"]
    assert everything.canary == "llama-1"
    assert len({m.name for m in everything.members}) == len(everything.members) >= 4
    some = fleet_for("onnxruntime-genai, external")
    assert [m.runtime for m in some.members] == ["llama.cpp", "onnxruntime-genai", "external"]
    assert some.targets == ("pi5-8gb", "n100-16gb@onnxruntime-genai")
    with pytest.raises(UsageError, match="'tensorrt' is not known"):
        fleet_for("tensorrt")


def test_what_is_installed_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv("SLMOPS_LLAMA_SERVER", raising=False)
    with pytest.raises(NotFoundError, match="executorch-1"):
        find_environments(fleet_for("executorch").members, tmp_path, tmp_path / "work")
    assert os.environ[VARIABLE] == str(tmp_path / "work" / "runtimes")


def test_the_owners_server_is_described_as_its_reader_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("SLMOPS_LLAMA_SERVER", str(program))
    assert stock_server(tmp_path) == program
    config = read_config(write_external_config(tmp_path, tmp_path / "made" / "external.json"))
    assert config.uses_socket
    assert "score" in str(config.capabilities()) and config.capabilities().embeddings


def test_the_example_has_a_variant_for_every_member_of_the_fleet() -> None:
    """What the demo asks the build for, and what its devices and blueprint are about, is in the project's files."""
    folder = ROOT / "examples" / "home-intents"
    fleet = fleet_for("all")
    (recipe,) = load_documents((folder / fleet.recipe).read_text(encoding="utf-8"), fleet.recipe)
    assert isinstance(recipe, Recipe)
    assert {target.key for target in recipe.targets} == set(fleet.targets or ())
    (blueprint,) = load_documents((folder / fleet.blueprint).read_text(encoding="utf-8"), fleet.blueprint)
    assert isinstance(blueprint, Blueprint)
    assert blueprint.model.name == recipe.metadata.name
    assert all(member.profile in blueprint.selector for member in fleet.members)
