"""What runtimes can do, as one table: the docs page and ``/v1/models/{id}`` show the same words.

The rows come from what each runtime declares (`Capabilities`), and what it declares is proven field by field by
``tests/contract/test_capabilities.py``. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from slmops.runtimes.ports import Capabilities


def matrix_of(capabilities: Capabilities) -> dict[str, Any]:
    """One runtime's capabilities as JSON: field names sorted, flags and numbers as they are."""
    values = {one.name: getattr(capabilities, one.name) for one in fields(capabilities)}
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in values.items()}


def matrix_table(runtimes: Mapping[str, Capabilities]) -> str:
    """A Markdown table: a row for each field or flag that any runtime has, a column for each runtime.

    Args:
        runtimes: by name, in the order of the columns.
    """
    rows: list[tuple[str, list[str]]] = []
    for title, attribute in (
        ("`/v1/chat/completions`", "chat_fields"),
        ("`/v1/completions`", "completion_fields"),
        ("KV cache", "kv_cache_types"),
    ):
        declared = [getattr(one, attribute) for one in runtimes.values()]
        for name in sorted(frozenset().union(*declared)):
            rows.append((f"{title} `{name}`", ["yes" if name in one else "–" for one in declared]))
    for one in fields(Capabilities):
        values = [getattr(capabilities, one.name) for capabilities in runtimes.values()]
        if any(isinstance(value, frozenset) for value in values):
            continue
        rows.append((f"`{one.name}`", [_cell(value) for value in values]))
    head = "| | " + " | ".join(runtimes) + " |\n|---|" + "---|" * len(runtimes)
    return "\n".join([head, *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows)])


def _cell(value: object) -> str:
    if value is None:
        return "as many as fit"
    return {True: "yes", False: "–"}[value] if isinstance(value, bool) else str(value)
