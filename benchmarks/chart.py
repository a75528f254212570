"""Bar charts as SVG, written by hand: a benchmark should not need a plotting library."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 460, 250  # of one panel, pixels
_LEFT, _TOP, _BOTTOM = 16, 42, 30  # around the bars
_COLUMNS = 2
_LEGEND = 34
_COLOURS = ("#2a6fbb", "#e08a2e", "#8c8c8c", "#4f9d69")
_INK, _FAINT = "#222222", "#d0d0d0"


@dataclass(frozen=True)
class Panel:
    """Groups of bars. values[series][group]; None: nothing is drawn there."""

    title: str
    groups: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


def write_chart(path: Path, title: str, series: Sequence[str], panels: Sequence[Panel]) -> None:
    """One legend above, panels side by side in rows of two. Bars of a panel share its scale, which begins at 0."""
    rows = -(-len(panels) // _COLUMNS)
    width, height = _WIDTH * _COLUMNS, 30 + _LEGEND + _HEIGHT * rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(_LEFT, 24, title, 'font-size="16" font-weight="bold"'),
        *_legend(series),
    ]
    for index, panel in enumerate(panels):
        x, y = index % _COLUMNS * _WIDTH, 30 + _LEGEND + index // _COLUMNS * _HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel), "</g>"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def _legend(series: Sequence[str]) -> list[str]:
    parts, x = [], _LEFT
    for name, colour in zip(series, _COLOURS, strict=False):
        parts += [f'<rect x="{x}" y="39" width="12" height="12" fill="{colour}"/>', _text(x + 18, 50, name)]
        x += 44 + 7 * len(name)
    return parts


def _panel(panel: Panel) -> list[str]:
    most = max((value for row in panel.values for value in row if value is not None), default=0) or 1.0
    room, floor = _HEIGHT - _TOP - _BOTTOM, _HEIGHT - _BOTTOM
    step = (_WIDTH - 2 * _LEFT) / len(panel.groups)
    bar = step * 0.84 / len(panel.values)
    parts = [_text(_LEFT, 18, panel.title, 'font-weight="bold"')]
    for at, group in enumerate(panel.groups):
        left = _LEFT + step * (at + 0.08)
        for index, row in enumerate(panel.values):
            value = row[at]
            if value is None:
                continue
            tall, x = room * value / most, left + bar * index
            parts += [
                f'<rect x="{x:.1f}" y="{floor - tall:.1f}" width="{bar * 0.94:.1f}" height="{tall:.1f}"'
                f' fill="{_COLOURS[index % len(_COLOURS)]}"/>',
                _text(x + bar * 0.47, floor - tall - 4, _number(value), 'text-anchor="middle" font-size="11"'),
            ]
        parts.append(_text(left + step * 0.42, floor + 18, group, 'text-anchor="middle"'))
    parts.append(f'<path d="M{_LEFT} {floor}H{_WIDTH - _LEFT}" stroke="{_FAINT}"/>')
    return parts


def _number(value: float) -> str:
    """Three figures, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'
