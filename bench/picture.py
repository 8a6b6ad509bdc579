"""A scatter plot as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 78, 30, 56, 62
_COLOURS = {"ours": "#0b6e4f", "stock": "#b23a48"}
_LEGEND = {"ours": "slmops", "stock": "llama.cpp's own recipe, same importance matrix"}
_LETTER, _LINE = 6.6, 13.0
#: places of a label around its point, best first: anchor, and by how much it is moved
_PLACES = (
    ("start", 9, 4),
    ("end", -9, 4),
    ("start", 7, -9),
    ("end", -7, -9),
    ("start", 7, 17),
    ("end", -7, 17),
    ("middle", 0, -12),
    ("middle", 0, 22),
    ("start", 7, -22),
    ("end", -7, 30),
)


@dataclass(frozen=True)
class Point:
    """One file: its size, its divergence, what it is called, and whose it is (``ours`` or ``stock``)."""

    megabytes: float
    kld: float
    name: str
    series: str


@dataclass(frozen=True)
class _Box:
    """A rectangle that is taken."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        """Area that both take."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


def scatter(title: str, points: Sequence[Point]) -> str:
    """Bytes across, KL divergence up (logarithmic)."""
    least, most = min(p.megabytes for p in points), max(p.megabytes for p in points)
    spare = max(most - least, 1.0) * 0.08
    left, right = least - spare, most + spare
    low, high = math.log10(min(p.kld for p in points)) - 0.12, math.log10(max(p.kld for p in points)) + 0.12

    def place(megabytes: float, kld: float) -> tuple[float, float]:
        x = LEFT + (megabytes - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (math.log10(kld) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="24" text-anchor="middle" font-size="15">{escape(title)}</text>',
    ]
    parts += _axes(left, right, low, high, place)
    parts += _legend()
    placed = {point: place(point.megabytes, point.kld) for point in points}
    taken = [_Box(x - 5, y - 5, x + 5, y + 5) for x, y in placed.values()]
    for series, colour in _COLOURS.items():
        own = sorted((p for p in points if p.series == series), key=lambda p: (p.megabytes, p.kld))
        best = [p for i, p in enumerate(own) if not any(q.kld < p.kld for q in own[:i])]  # what nothing beats
        line = " ".join(f"{x},{y}" for x, y in (placed[p] for p in best))
        if line:
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity="0.45"/>')
        for point in own:
            x, y = placed[point]
            parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour}"/>')
    for point in sorted(points, key=lambda p: (p.kld, p.megabytes, p.name)):
        parts.append(_label(point, placed[point], taken))
    return "\n".join([*parts, "</svg>", ""])


def _axes(
    left: float, right: float, low: float, high: float, place: Callable[[float, float], tuple[float, float]]
) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 3, 5):
            value = digit * 10.0**exponent
            if low <= math.log10(value) <= high:
                _, y = place(left, value)
                parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#e3e3e3"/>')
                parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if (right - left) / s <= 10 or s == 1000)
    for megabytes in range(math.ceil(left / step) * step, math.floor(right) + 1, step):
        x, _ = place(megabytes, 10**low)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 5}" stroke="#555"/>')
        parts.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{megabytes}</text>')
    return [
        *parts,
        f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="#555"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 16}" text-anchor="middle">size of the file, MB</text>',
        f'<text transform="translate(22 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        "mean KL divergence from F16, nats a token</text>",
    ]


def _legend() -> list[str]:
    x, parts = float(LEFT), []
    for series, colour in _COLOURS.items():
        parts.append(f'<circle cx="{x + 5}" cy="42" r="4.5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="46">{escape(_LEGEND[series])}</text>')
        x += 40 + _LETTER * len(_LEGEND[series])
    return parts


def _label(point: Point, at: tuple[float, float], taken: list[_Box]) -> str:
    """A label where it covers least."""
    x, y = at
    width = _LETTER * len(point.name)
    choices = []
    for anchor, right, down in _PLACES:
        begin = x + right - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = _Box(begin, y + down - _LINE + 3, begin + width, y + down + 3)
        outside = (
            max(LEFT - box.left, 0.0)
            + max(box.right - WIDTH + 2, 0.0)
            + max(box.bottom - HEIGHT + BOTTOM, 0.0)
        )
        choices.append((sum(box.overlap(other) for other in taken) + 50 * outside, anchor, right, down, box))
    _, anchor, right, down, box = min(choices, key=lambda choice: choice[0])
    taken.append(box)
    return (
        f'<text x="{x + right:.1f}" y="{y + down:.1f}" text-anchor="{anchor}" fill="{_COLOURS[point.series]}">'
        f"{escape(point.name)}</text>"
    )
