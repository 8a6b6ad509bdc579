"""Links between a lab device and its control plane, by name or by their figures."""

from __future__ import annotations

from dataclasses import replace

from slmops.core.errors import UsageError
from slmops.testing.link import LinkProfile

#: what the names stand for; ``lan`` is no relay at all
NETWORKS: dict[str, LinkProfile] = {
    "lan": LinkProfile(),
    "dsl": LinkProfile(rate_bytes_s=2e6, delay_s=0.02),
    "lte": LinkProfile(rate_bytes_s=5e6, delay_s=0.06, break_ratio=0.0005),
    "flaky": LinkProfile(rate_bytes_s=8e6, delay_s=0.05, break_ratio=0.002, cut_after_s=3.0, cut_for_s=6.0),
}
_UNITS = {"kB/s": 1e3, "MB/s": 1e6}


def parse_network(text: str) -> LinkProfile:
    """A link from its name, or from figures as in ``rate=1MB/s,delay=100ms,loss=0.5%,cut=10s``.

    ``loss`` is the chance with which 16 KiB break their connection; ``cut`` is how long nothing gets through, beginning
    3 seconds after the first connection.

    Raises:
        UsageError: neither.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    profile = LinkProfile()
    for setting in text.split(","):
        name, _, value = setting.partition("=")
        try:
            if name == "rate":
                unit = next(unit for unit in _UNITS if value.endswith(unit))
                profile = replace(profile, rate_bytes_s=_positive(value.removesuffix(unit)) * _UNITS[unit])
            elif name == "delay" and value.endswith("ms"):
                profile = replace(profile, delay_s=_positive(value.removesuffix("ms")) / 1e3)
            elif name == "loss" and value.endswith("%"):
                profile = replace(profile, break_ratio=min(_positive(value.removesuffix("%")) / 100, 1.0))
            elif name == "cut" and value.endswith("s"):
                profile = replace(profile, cut_after_s=3.0, cut_for_s=_positive(value.removesuffix("s")))
            else:
                raise ValueError(setting)
        except (ValueError, StopIteration) as error:
            raise UsageError(
                f"--network {text!r}: {setting!r} is not understood",
                hint=f"a name ({', '.join(NETWORKS)}), or figures: rate=1MB/s,delay=100ms,loss=0.5%,cut=10s",
            ) from error
    return profile


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError(text)
    return value
