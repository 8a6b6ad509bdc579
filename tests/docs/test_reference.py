"""Docs cannot lie: what is generated is fresh, what is listed is complete, what is linked exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import generate
import pytest

from slmops.core import errors
from slmops.protocol.documents import json_schema, load_documents
from slmops.protocol.documents.reader import KINDS

DOCS = Path(generate.__file__).parent
REFERENCE = DOCS / "reference"
PAGES = [
    *sorted(path for folder in ("reference", "adr") for path in (DOCS / folder).glob("*.md")),
    DOCS / "glossary.md",
]

#: the words of DESIGN section 1
WORDS = [
    "device",
    "profile",
    "fleet",
    "cohort",
    "site",
    "base",
    "model",
    "recipe",
    "step",
    "run",
    "variant",
    "artifact",
    "chunk",
    "adapter",
    "release",
    "channel",
    "recall",
    "blueprint",
    "overlay",
    "assignment",
    "rollout",
    "wave",
    "gate",
    "evidence",
    "verdict",
    "bake",
    "holdback",
    "slot",
    "probation",
    "commit",
    "revert",
    "rollback",
    "abort",
    "state",
    "status",
    "golden pack",
]


def test_generated_parts_are_fresh() -> None:
    """Diagrams, tables and schemas say what the code says; ``python docs/generate.py`` mends it."""
    stale = [
        str(path.relative_to(DOCS))
        for path, content in generate.pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != content
    ]
    assert stale == []


def test_every_generator_has_its_place() -> None:
    used = set()
    for path in REFERENCE.glob("*.md"):
        used |= set(re.findall(r"<!-- generated: ([\w-]+) -->", path.read_text(encoding="utf-8")))
    assert used == set(generate.PARTS)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_published_schemas_are_the_generated_ones(kind: str) -> None:
    assert json.loads((REFERENCE / "schemas" / f"{kind}.json").read_text(encoding="utf-8")) == json_schema(
        kind
    )


def test_no_schema_is_published_for_a_kind_that_is_gone() -> None:
    assert {path.stem for path in (REFERENCE / "schemas").glob("*.json")} == set(KINDS)


@pytest.mark.parametrize("kind", generate.error_classes(), ids=lambda kind: kind.__name__)
def test_every_error_is_listed_with_its_codes(kind: type[errors.SlmopsError]) -> None:
    page = (REFERENCE / "errors.md").read_text(encoding="utf-8")
    row = f"| `{kind.code}` | `{kind.__name__}` | {kind.exit_code} | {kind.http_status} | {kind.retry} |"
    assert page.count(row) == 1


def test_the_error_list_is_complete() -> None:
    """Also against the module's own tree drawing."""
    defined = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.SlmopsError)
    }
    assert {kind.__name__ for kind in generate.error_classes()} == defined
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or "")) | {"SlmopsError"}
    assert drawn == defined


@pytest.mark.parametrize("word", WORDS)
def test_the_glossary_defines_every_word(word: str) -> None:
    assert f"**{word}**" in (DOCS / "glossary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files that exist, and headings that they have."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, heading = link.partition("#")
        target = page if not file else (page.parent / file).resolve()
        assert target.exists(), f"{page.name}: {link}"
        if heading:
            assert heading in anchors(target), f"{page.name}: {link}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_documents_in_the_reference_are_valid() -> None:
    """Every YAML example with a kind is read by the real reader."""
    text = (REFERENCE / "documents.md").read_text(encoding="utf-8")
    examples = [
        block for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL) if "kind:" in block
    ]
    assert len(examples) == len(KINDS)
    assert {
        type(document) for block in examples for document in load_documents(block, "documents.md")
    } == set(KINDS.values())


@pytest.mark.parametrize("page", sorted((DOCS / "adr").glob("*.md")), ids=lambda page: page.stem)
def test_decisions_have_the_same_form(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {'NNNN' if page.stem.startswith('0000') else page.stem[:4]}: ")
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings == ["Question", "Decision", "Why", "What follows"]
    assert re.search(r"^\* Status: ", text, flags=re.MULTILINE)


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = sorted(int(path.stem[:4]) for path in (DOCS / "adr").glob("*.md"))
    assert numbers == list(range(len(numbers)))
