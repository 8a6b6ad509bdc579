"""The core's wall, as a closed list: what it may import from the standard library, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import slmops

PACKAGE = Path(slmops.__file__).parent
PURE = {
    "__future__",
    "collections",
    "collections.abc",
    "dataclasses",
    "datetime",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "hmac",
    "itertools",
    "math",
    "re",
    "statistics",
    "typing",
}
#: what the sans-IO rooms may use besides the core's list
ARTIFACT = PURE | {
    "struct",
    "msgspec",
    "rfc8785",
    "tuf",
    "securesystemslib",
    "cryptography",
    "base64",
    "json",
    "numpy",
}
MESSAGES = PURE | {"msgspec"}
DOCUMENTS = PURE | {"decimal", "pydantic", "yaml"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def foreign(folder: str, allowed: set[str]) -> dict[str, set[str]]:
    found = {}
    for path in sorted(
        (PACKAGE / folder).rglob("*.py") if (PACKAGE / folder).is_dir() else [PACKAGE / folder]
    ):
        odd = {
            name
            for name in imports(path)
            if not name.startswith("slmops.") and name not in allowed and name.split(".")[0] not in allowed
        }
        if odd:
            found[str(path.relative_to(PACKAGE))] = odd
    return found


def test_the_core_is_pure() -> None:
    """No IO, clock, chance, environment or logging; numpy in search only."""
    assert foreign("core/search", PURE | {"numpy"}) == {}
    assert {path for path in foreign("core", PURE) if not path.startswith("core/search/")} == set()


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [("artifact", ARTIFACT), ("protocol/messages.py", MESSAGES), ("protocol/documents", DOCUMENTS)],
)
def test_the_sans_io_rooms_do_no_io(folder: str, allowed: set[str]) -> None:
    assert foreign(folder, allowed) == {}


@pytest.mark.parametrize(
    "call", ["open", "print", "input", "eval", "exec", "now", "today", "utcnow", "__import__"]
)
def test_nothing_pure_reaches_around_its_imports(call: str) -> None:
    guilty = []
    for path in sorted(
        path for room in ("core", "artifact", "protocol") for path in (PACKAGE / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if getattr(called, "id", getattr(called, "attr", None)) == call:
                guilty.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert guilty == []
