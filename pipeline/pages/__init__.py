"""What the pages for people have in common: one style sheet, and figures as inline SVG or PNG. No clock, no display.

In the SVG every colour is a CSS variable, so that the page decides them for light and for dark.
"""

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline import tables

INK, MUTED, RULE = "#1d2530", "#657080", "#d9dee5"
SAME, DIFFERENT = "#0f7a6c", "#c4532d"
CSS_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    SAME: "var(--same)",
    DIFFERENT: "var(--different)",
}
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same everywhere
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
}
PERCENT = FuncFormatter(lambda share, _: f"{round(100 * share, 9):g}%")


def render(template: Path, out: Path, **values: Any) -> None:
    """Write a page from a Jinja template, atomically; values are escaped, and a missing one is an error."""
    templates = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    page = templates.get_template(template.name).render(style=style, **values)
    with tables.atomic(out) as path:
        path.write_text(page, encoding="utf-8")


def data_uri(picture: bytes, kind: str = "image/jpeg") -> str:
    """A picture as the address of an `<img>`."""
    return f"data:{kind};base64," + base64.b64encode(picture).decode("ascii")


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically; the same figure gives the same bytes."""
    with tables.atomic(path) as temporary, mpl.rc_context(STYLE):
        figure.savefig(temporary, format="png", dpi=180, metadata={"Software": None})


def to_svg(figure: Figure, name: str) -> str:
    """A figure as an `<svg>` element for a page, its colours as CSS variables.

    Args:
        name: unique on the page; keeps the figures' internal references apart.
    """
    content = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=metadata)
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def axes() -> tuple[Figure, Axes]:
    """A figure of the pages' size with one pair of axes."""
    figure = Figure(figsize=(4.2, 3.1), layout="constrained")
    return figure, figure.add_subplot()
