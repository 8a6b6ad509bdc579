"""A scatter plot as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, MARGIN = 760, 460, 60
_COLOURS = {"ours": "#0b6e4f", "stock": "#b23a48"}


@dataclass(frozen=True)
class Point:
    """One file: its size, its divergence, what it is called, and whose it is (``ours`` or ``stock``)."""

    megabytes: float
    kld: float
    name: str
    series: str


def scatter(title: str, points: Sequence[Point]) -> str:
    """Bytes across, KL divergence up (logarithmic)."""
    left, right = min(p.megabytes for p in points) * 0.97, max(p.megabytes for p in points) * 1.03
    low, high = math.log10(min(p.kld for p in points)) - 0.1, math.log10(max(p.kld for p in points)) + 0.1

    def place(megabytes: float, kld: float) -> tuple[float, float]:
        x = MARGIN + (megabytes - left) / (right - left) * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - (math.log10(kld) - low) / (high - low) * (HEIGHT - 2 * MARGIN)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="24" text-anchor="middle" font-size="15">{escape(title)}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">file, MB</text>',
        f'<text x="16" y="{HEIGHT / 2}" transform="rotate(-90 16 {HEIGHT / 2})" text-anchor="middle">'
        "mean KL divergence, nats</text>",
    ]
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**exponent
            if low <= math.log10(value) <= high:
                _, y = place(left, value)
                parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="#ddd"/>')
                parts.append(f'<text x="{MARGIN - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    step = 5 if right - left < 60 else 20
    for megabytes in range(math.ceil(left / step) * step, math.floor(right) + 1, step):
        x, _ = place(megabytes, 10**low)
        parts.append(f'<text x="{x}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{megabytes}</text>')
    for series, colour in _COLOURS.items():
        own = sorted((p for p in points if p.series == series), key=lambda p: p.megabytes)
        line = " ".join(f"{x},{y}" for x, y in (place(p.megabytes, p.kld) for p in own))
        if series == "ours" and own:
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        for point in own:
            x, y = place(point.megabytes, point.kld)
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
            parts.append(f'<text x="{x + 6}" y="{y - 6}" fill="{colour}">{escape(point.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])
