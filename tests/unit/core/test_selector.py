"""Label selectors: every form of the grammar, and mistakes quoted back."""

from __future__ import annotations

import pytest

from slmops.core.errors import UsageError
from slmops.core.rollout.selector import parse_selector

PI = {"profile": "pi5-8gb", "site": "hki", "canary": "always"}
N100 = {"profile": "n100-16gb", "site": "lab"}
BARE: dict[str, str] = {}


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("", "pi n100 bare"),
        ("all", "pi n100 bare"),
        ("  all  ", "pi n100 bare"),
        ("site = hki", "pi"),
        ("site=hki", "pi"),
        ("site == hki", "pi"),
        ("site != lab", "pi bare"),
        ("profile in (pi5-8gb, n100-16gb)", "pi n100"),
        ("profile in (pi5-8gb,n100-16gb) and site != lab", "pi"),
        ("profile not in (pi5-8gb)", "n100 bare"),
        ("profile  not   in  (pi5-8gb)", "n100 bare"),
        ("canary", "pi"),
        ("!canary", "n100 bare"),
        ("! canary and site = lab", "n100"),
        ("site in (land and sea, lab)", "n100"),
        ("example.com/site = x", ""),
    ],
)
def test_who_is_selected(text: str, selected: str) -> None:
    selector = parse_selector(text)
    devices = {"pi": PI, "n100": N100, "bare": BARE}
    assert " ".join(name for name, labels in devices.items() if selector.matches(labels)) == selected


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("site =", "site ="),
        ("site = hki or site = lab", "site = hki or site = lab"),
        ("site = hki and", "site = hki and"),
        ("profile in ()", "lists no values"),
        ("profile in pi5", "profile in pi5"),
        ("profilein (pi5)", "profilein (pi5)"),
        ("= x", "= x"),
        ("site = a b", "site = a b"),
        ("site ~ hki", "site ~ hki"),
    ],
)
def test_what_cannot_be_read_is_quoted_with_an_example(text: str, quoted: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_selector(text)
    assert quoted in caught.value.message
    assert caught.value.hint
