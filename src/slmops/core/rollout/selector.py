"""Label selectors: ``profile in (pi5-8gb, n100-16gb) and site != lab``.

Grammar (a conjunction, as in Kubernetes' set-based selectors, with ``and`` for the comma)::

    selector = "" | "all" | term { "and" term }
    term     = key "=" value | key "!=" value | key "in" list | key "not in" list | key | "!" key
    list     = "(" value {"," value} ")"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from slmops.core.errors import UsageError

_KEY = r"[A-Za-z0-9][A-Za-z0-9._/-]*"
_TERM = re.compile(
    rf"^(?:(?P<absent>!\s*{_KEY})|(?P<key>{_KEY})"
    rf"(?:\s*(?P<op>!=|==|=)\s*(?P<value>{_KEY})|\s+(?P<set>not\s+in|in)\s*\((?P<values>[^()]*)\))?)$"
)
_AND = re.compile(r"\s+and\s+(?![^(]*\))")


@dataclass(frozen=True, slots=True)
class Term:
    """One condition: ``key`` is (not) among ``values``; with no values, ``key`` is (not) present."""

    key: str
    values: tuple[str, ...]
    negated: bool

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a device with these labels satisfies the condition."""
        found = self.key in labels if not self.values else labels.get(self.key) in self.values
        return found is not self.negated


@dataclass(frozen=True, slots=True)
class Selector:
    """A conjunction of terms; no terms select every device."""

    terms: tuple[Term, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a device with these labels is selected."""
        return all(term.matches(labels) for term in self.terms)


def parse_selector(text: str) -> Selector:
    """Read a selector.

    Raises:
        UsageError: a term is not of the grammar; the message quotes it.
    """
    text = text.strip()
    if text in ("", "all"):
        return Selector(())
    return Selector(tuple(_parse_term(part.strip(), text) for part in _AND.split(text)))


def _parse_term(part: str, whole: str) -> Term:
    match = _TERM.match(part)
    if match is None:
        raise UsageError(
            f"selector {whole!r}: cannot read {part!r}",
            hint="write terms like site = hki, site != lab, profile in (pi5-8gb, n100-16gb), joined by 'and'",
        )
    if match["absent"]:
        return Term(match["absent"][1:].strip(), (), True)
    if match["op"]:
        return Term(match["key"], (match["value"],), match["op"] == "!=")
    if match["set"]:
        values = tuple(value.strip() for value in match["values"].split(",") if value.strip())
        if not values:
            raise UsageError(
                f"selector {whole!r}: {part!r} lists no values",
                hint="put at least one value between the parentheses",
            )
        return Term(match["key"], values, match["set"] != "in")
    return Term(match["key"], (), False)
