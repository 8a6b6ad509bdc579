"""The table of bench/runtimes.py, as text and as a picture: one row a variant, one column a figure, a bar in every cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_NAME, _CELL, _ROW, _TOP, _MARGIN = 210, 118, 34, 78, 18
_BAR, _BEST = "#9db8d9", "#0b6e4f"


@dataclass(frozen=True)
class Row:
    """One variant; None is "not measured". Bytes, seconds, tokens/s, nats a token; ratios are 0..1."""

    name: str
    file_bytes: float
    kld: float | None
    kld_p99: float | None
    same_top_ratio: float | None
    task_ratio: float | None
    prefill_tps: float
    decode_tps: float
    ttft_s: float
    load_s: float
    peak_rss_bytes: float
    footprint_bytes: float | None
    export_s: float | None
    busy_ratio: float


@dataclass(frozen=True)
class _Column:
    title: str
    unit: str
    value: Callable[[Row], float | None]
    shown: str
    more_is_better: bool = False


COLUMNS = (
    _Column("files", "MB", lambda row: row.file_bytes / 1e6, ".1f"),
    _Column("mean KL", "nats a token", lambda row: row.kld, ".5f"),
    _Column("99 % KL", "nats a token", lambda row: row.kld_p99, ".4f"),
    _Column("same top", "%", lambda row: _times(row.same_top_ratio, 100), ".1f", True),
    _Column("task", "% right", lambda row: _times(row.task_ratio, 100), ".0f", True),
    _Column("prefill", "tokens/s", lambda row: row.prefill_tps, ".0f", True),
    _Column("decode", "tokens/s", lambda row: row.decode_tps, ".1f", True),
    _Column("first token", "ms", lambda row: row.ttft_s * 1e3, ".0f"),
    _Column("load", "s", lambda row: row.load_s, ".1f"),
    _Column("peak RSS", "MB", lambda row: row.peak_rss_bytes / 1e6, ".0f"),
    _Column("footprint", "MB installed", lambda row: _times(row.footprint_bytes, 1e-6), ".0f"),
    _Column("export", "s", lambda row: row.export_s, ".0f"),
)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _cell(column: _Column, row: Row) -> str:
    value = column.value(row)
    return "-" if value is None else format(value, column.shown)


def as_text(rows: Sequence[Row]) -> str:
    """Columns of equal width."""
    lines = [f"{'':28}" + "".join(f"{column.title:>14}" for column in COLUMNS)]
    lines.append(f"{'':28}" + "".join(f"{column.unit:>14}" for column in COLUMNS))
    for row in rows:
        lines.append(f"{row.name:28}" + "".join(f"{_cell(column, row):>14}" for column in COLUMNS))
    return "\n".join(lines)


def as_svg(title: str, note: str, rows: Sequence[Row]) -> str:
    """The same as a picture: bars from zero, a column's longest is its greatest figure; the best one is green.

    Args:
        title: heading.
        note: a line under it.
        rows: at least one.
    """
    width = _NAME + _CELL * len(COLUMNS) + _MARGIN
    height = _TOP + 30 + _ROW * len(rows) + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#1f2933">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_MARGIN}" y="26" font-size="17" font-weight="bold">{escape(title)}</text>',
        f'<text x="{_MARGIN}" y="46" fill="#616e7c">{escape(note)}</text>',
    ]
    for index, row in enumerate(rows):
        y = _TOP + 30 + _ROW * index
        if index % 2 == 0:
            parts.append(f'<rect x="0" y="{y}" width="{width}" height="{_ROW}" fill="#f5f7fa"/>')
        parts.append(f'<text x="{_MARGIN}" y="{y + 21}">{escape(row.name)}</text>')
    for index, column in enumerate(COLUMNS):
        x = _NAME + _CELL * index
        parts.append(f'<text x="{x}" y="{_TOP + 4}" font-weight="bold">{escape(column.title)}</text>')
        parts.append(f'<text x="{x}" y="{_TOP + 20}" fill="#616e7c">{escape(column.unit)}</text>')
        parts += _bars(column, rows, x)
    return "\n".join([*parts, "</svg>", ""])


def _bars(column: _Column, rows: Sequence[Row], x: int) -> list[str]:
    values = [column.value(row) for row in rows]
    known = [value for value in values if value is not None]
    if not known:
        known = [0.0]
    best, most = (max if column.more_is_better else min)(known), max(known) or 1.0
    parts = []
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        y = _TOP + 30 + _ROW * index
        if value is not None:
            colour = _BEST if value == best and len(set(known)) > 1 else _BAR
            length = max((_CELL - 16) * value / most, 1.0)
            parts.append(f'<rect x="{x}" y="{y + 22}" width="{length:.1f}" height="7" fill="{colour}"/>')
        parts.append(f'<text x="{x}" y="{y + 17}">{_cell(column, row)}</text>')
    return parts
