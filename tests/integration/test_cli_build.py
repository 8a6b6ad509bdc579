"""The command line of builds: from flags alone to plain words, and errors that say what to write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.support.build_directory import make_build_directory
from tests.support.tiny_model import make_tiny_gguf

from slmops.cli.build.steps import duration
from slmops.cli.main import root
from slmops.core.errors import ConflictError, DocumentError, NotFoundError, SlmopsError, UsageError
from slmops.protocol.documents import load_documents
from slmops.protocol.documents.recipe import Recipe


def slmops(*arguments: object) -> Result:
    result = CliRunner().invoke(root, [str(argument) for argument in arguments])
    if isinstance(result.exception, SlmopsError):
        raise result.exception
    return result


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_starter_project_is_a_valid_recipe(here: Path) -> None:
    """With our base or the user's; never over something that is there."""
    slmops("init", "mine")
    make_tiny_gguf(here / "m.gguf")
    slmops("init", "other", "--base", "m.gguf", "--profile", "n100-16gb", "--examples", "mine/examples.jsonl")
    for name in ("mine", "other"):
        text = (here / name / "recipe.yaml").read_text()
        (recipe,) = load_documents(text, "recipe.yaml")
        assert isinstance(recipe, Recipe)
        assert recipe.task.examples == "examples.jsonl"
    assert 'gguf: "../m.gguf"' in (here / "other" / "recipe.yaml").read_text()
    slmops("init", "phone", "--profile", "android-mid", "--profile", "pi5-8gb")
    (recipe,) = load_documents((here / "phone" / "recipe.yaml").read_text(), "recipe.yaml")
    assert isinstance(recipe, Recipe)
    assert [target.runtime for target in recipe.targets] == [
        "litert-lm",
        "llama.cpp",
    ]  # what these devices have
    with pytest.raises(ConflictError, match="exists"):
        slmops("init", "mine")
    with pytest.raises(UsageError, match=r"--base nothing\.gguf: does not exist"):
        slmops("init", "new", "--base", "nothing.gguf")
    assert not (here / "new").exists()


def test_flags_alone_build_and_are_written_down(here: Path) -> None:
    """Base, examples, profiles: a recipe beside the build, the build in words, the second run has nothing to do."""
    make_tiny_gguf(here / "Tiny Model.gguf")
    lines = [json.dumps({"prompt": f"turn on {i}", "answer": {"on": i}}) for i in range(6)]
    (here / "e.jsonl").write_text("\n".join(lines))
    flags = (
        "--base",
        "Tiny Model.gguf",
        "--examples",
        "e.jsonl",
        "--cache",
        "cache",
        "--fast",
        "--workers",
        0,
    )
    first = slmops("build", "run", *flags)
    assert first.exit_code == 0, first.output
    assert "built build/tiny-model" in first.output
    text = (here / "build" / "tiny-model.yaml").read_text()
    assert 'gguf: "../Tiny Model.gguf"' in text
    assert "nothing to do" in slmops("build", "run", *flags).output
    shown = slmops("build", "show", "build/tiny-model", "--picture", "v.svg").output
    for words in ("what was chosen", "what it costs in quality", "what would help", "wrote v.svg"):
        assert words in shown
    assert (here / "v.svg").read_text().startswith("<svg")
    value = json.loads(slmops("build", "show", "build/tiny-model", "--json").output)
    assert value["explained"][0]["cost"]
    assert value["points"][0]["profile"] == "pi5-8gb"
    (here / "build" / "tiny-model.yaml").write_text(text + "# mine\n")
    with pytest.raises(ConflictError, match="exists and was edited"):
        slmops("build", "run", *flags)


def test_flags_that_failed_or_changed_do_not_stand_in_the_way(here: Path) -> None:
    """A mistake in the flags leaves a recipe behind; mended flags overwrite it, for nobody edited it."""
    make_tiny_gguf(here / "m.gguf")
    (here / "bad.jsonl").write_text('{"prompt": "a"}\n')
    (here / "good.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(DocumentError, match=rf"^{here}/bad\.jsonl:1"):
        slmops("build", "run", "--base", "m.gguf", "--examples", "bad.jsonl", "--cache", "cache")
    assert "bad.jsonl" in (here / "build" / "m.yaml").read_text()
    with pytest.raises(DocumentError, match="at least 4"):
        slmops("build", "run", "--base", "m.gguf", "--examples", "good.jsonl", "--cache", "cache")
    assert "good.jsonl" in (here / "build" / "m.yaml").read_text()


def test_a_project_is_built_by_its_folder(here: Path) -> None:
    """As people type it; a folder without a recipe is told apart."""
    slmops("init", "mine")
    text = (here / "mine" / "recipe.yaml").read_text()
    assert "slmops build run mine/recipe.yaml" in text
    (here / "mine" / "recipe.yaml").write_text(text.replace("pi5-8gb", "toaster"))
    with pytest.raises(NotFoundError, match="toaster"):
        slmops("build", "run", "mine", "--cache", "cache")
    (here / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty is a folder without recipe\.yaml"):
        slmops("build", "run", "empty")


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ((), UsageError, "RECIPE is missing"),
        (("--base", "m.gguf"), UsageError, "--examples is missing"),
        (("--examples", "e.jsonl"), UsageError, "--base is missing"),
        (("r.yaml", "--base", "m.gguf"), UsageError, "expected one or the other"),
        (("--base", "m.gguf", "--examples", "no.jsonl"), UsageError, r"--examples no\.jsonl: does not exist"),
        (("--base", "no.gguf", "--examples", "e.jsonl"), UsageError, r"--base no\.gguf: does not exist"),
        (("--base", "e.jsonl", "--examples", "e.jsonl"), UsageError, r"--base e\.jsonl: is no \.gguf file"),
        (
            ("--base", "m.gguf", "--examples", "e.jsonl", "--profile", "toaster"),
            NotFoundError,
            "profile 'toaster' is not known",
        ),
        (("no.yaml",), DocumentError, r"no\.yaml: cannot be read"),
        (("--base", "m.gguf", "--examples", "e.jsonl"), DocumentError, r"e\.jsonl:1: has no answer"),
    ],
)
def test_errors_that_teach(
    here: Path, flags: tuple[str, ...], error: type[SlmopsError], message: str
) -> None:
    """What was wrong, with its value, and what to write instead."""
    make_tiny_gguf(here / "m.gguf")
    (here / "e.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(error, match=message) as caught:
        slmops("build", "run", *flags, "--cache", "cache")
    assert caught.value.hint


def test_help_has_examples() -> None:
    for command in (("build", "run"), ("build", "show"), ("build", "diff"), ("init",)):
        text = slmops(*command, "--help").output
        assert "Example" in text
        assert "slmops " + " ".join(command) in text


def test_a_difference_in_words(here: Path) -> None:
    one = make_build_directory(here / "one")
    assert "hold the same build" in slmops("build", "diff", one, one).output
    assert json.loads(slmops("build", "diff", one, one, "--json").output) == {}


def test_durations_for_people() -> None:
    assert [duration(s) for s in (4.4, 89, 100, 7200)] == ["4 s", "89 s", "2 min", "2.0 h"]


def test_a_build_directory_that_cannot_be_made_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    with pytest.raises(UsageError, match=r"--out .* may not be written to"):
        slmops("build", "run", recipe, "--out", tmp_path / "file" / "build")
