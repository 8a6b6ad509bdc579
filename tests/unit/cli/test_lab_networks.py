"""Links by name or by figures."""

from __future__ import annotations

import pytest

from slmops.cli.lab.networks import NETWORKS, parse_network
from slmops.core.errors import UsageError
from slmops.testing.link import LinkProfile


def test_a_name_or_figures() -> None:
    assert parse_network("lan") == LinkProfile()
    assert parse_network("flaky") == NETWORKS["flaky"]
    assert parse_network("rate=1.5MB/s,delay=100ms,loss=0.5%,cut=10s") == LinkProfile(
        rate_bytes_s=1.5e6, delay_s=0.1, break_ratio=0.005, cut_after_s=3.0, cut_for_s=10.0
    )
    assert parse_network("rate=64kB/s").rate_bytes_s == 64e3


@pytest.mark.parametrize(
    "text", ["", "5g", "rate=1", "rate=0MB/s", "delay=1s", "loss=nan%", "rate=1MB/s;cut=3s"]
)
def test_anything_else_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="not understood") as caught:
        parse_network(text)
    assert "flaky" in (caught.value.hint or "")
