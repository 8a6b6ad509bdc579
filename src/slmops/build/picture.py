"""The variants as a picture: an SVG without scripts, fonts or links, that any browser shows.

Bytes to the right, mean KL divergence upwards, tokens/s as the size of the point; filled points are those that no other
variant beats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 40, 60, 70
_SMALLEST, _LARGEST = 7.0, 22.0
_TICKS = 5
_INK, _FAINT, _FILL = "#1f2933", "#d5dbe1", "#2b6cb0"


def svg(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The picture.

    Args:
        title: heading.
        rows: as :func:`slmops.build.report.points` gives them, at least one.
    """
    sizes = _range([row["artifact_bytes"] / 1e6 for row in rows])
    losses = _range([row["kld_mean"] for row in rows])
    fastest = max(row["decode_tps"] for row in rows) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="13" fill="{_INK}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="30" font-size="17" font-weight="bold">{escape(title)}</text>',
    ]
    for tick in range(_TICKS):
        share = tick / (_TICKS - 1)
        x, y = _x(share), _y(share)
        size, loss = sizes[0] + share * (sizes[1] - sizes[0]), losses[0] + share * (losses[1] - losses[0])
        parts.append(
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="{_FAINT}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:.4f}</text>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{size:.1f}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 22}" text-anchor="middle">file, MB</text>'
    )
    parts.append(
        f'<text x="20" y="{middle}" text-anchor="middle" transform="rotate(-90 20 {middle})">'
        "mean KL divergence, nats a token</text>"
    )
    for row in sorted(rows, key=lambda row: -row["decode_tps"]):  # large circles first: none hides another
        x = _x(_share(row["artifact_bytes"] / 1e6, sizes))
        y = _y(_share(row["kld_mean"], losses))
        radius = _SMALLEST + (_LARGEST - _SMALLEST) * row["decode_tps"] / fastest
        fill = _FILL if row["pareto"] else "#ffffff"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" fill-opacity="0.75" stroke="{_FILL}" '
            'stroke-width="2"/>'
        )
        name = f"{row['profile']} · {row['decode_tps']:.0f} tokens/s"
        ends = x > _WIDTH * 0.62
        anchor, at = ("end", x - radius - 6) if ends else ("start", x + radius + 6)
        parts.append(f'<text x="{at:.1f}" y="{y - 4:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest with a margin, so that no point lies on the frame."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    return max(low - margin, 0.0), high + margin


def _share(value: float, among: tuple[float, float]) -> float:
    return (value - among[0]) / (among[1] - among[0])


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)
