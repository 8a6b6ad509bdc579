"""The OpenAI conformance report is what was run, holds no silent case, and the scripted engine keeps the API too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops.testing.engine import FAKE_RUNTIME, write_fake_model
from tests.conformance.openai_cases import Case, Clients, cases, run_case
from tests.conformance.openai_report import MODEL, PAGE, QUESTIONS, device, page, read_found

#: a scripted engine chooses no tokens, so it has no effect of these to show; what it declares is tested elsewhere
SCRIPTED = (
    "chat: seed",
    "chat: stop",
    "chat: top_p 0 takes the likeliest",
    "stream: first part carries the role",
)
_TEXT = {**QUESTIONS, "colours": "Red green and blue are three colours of many"}


def test_the_page_is_what_was_run() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_found())


def test_no_runtime_drops_a_field_silently() -> None:
    found = read_found()
    assert {"llama.cpp", "external"} <= {one["runtime"] for one in found}
    for one in found:
        silent = [row["case"] for row in one["outcomes"] if row["outcome"] == "silent"]
        assert not silent, (one["runtime"], silent)
        assert {row["client"] for row in one["outcomes"]} == {"openai", "litellm", "langchain-openai"}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    folder = tmp_path_factory.mktemp("conformance")
    model = write_fake_model(folder / "model.json", _TEXT)
    with device(FAKE_RUNTIME, model, folder) as url:
        made = Clients(url, MODEL)
        yield made
        made.close()


@pytest.mark.e2e
@pytest.mark.parametrize(
    "case", [case for case in cases() if case.client == "openai"], ids=lambda case: case.name
)
def test_nothing_is_silent_on_the_scripted_engine(clients: Clients, case: Case) -> None:
    if case.name in SCRIPTED:
        pytest.skip("a scripted engine has no effect of it to show")
    outcome = run_case(case, clients)
    assert outcome.outcome != "silent", outcome


@pytest.mark.model
@pytest.mark.e2e
@pytest.mark.slow
def test_what_was_found_is_found_again(small_model: Path, tmp_path: Path) -> None:
    """llama.cpp, the official client: the same outcomes as in the page."""
    (kept,) = [one for one in read_found() if one["runtime"] == "llama.cpp"]
    expected = {row["case"]: row["outcome"] for row in kept["outcomes"] if row["client"] == "openai"}
    with device("llama.cpp", small_model, tmp_path) as url:
        made = Clients(url, MODEL)
        found = {case.name: run_case(case, made).outcome for case in cases() if case.client == "openai"}
        made.close()
    assert found == expected
