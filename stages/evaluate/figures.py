"""The figures of the reports, as PNG files (for DVC and MLflow) and as inline SVG (for the page). No clock, no display.

In the SVG every colour is a CSS variable, so that the page decides them for light and for dark.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from pipeline import tables
from stages.evaluate.verification import Metrics, Roc

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
ROC_POINTS = 1000
PERCENT = FuncFormatter(lambda share, _: f"{round(100 * share, 9):g}%")


def thin(roc: Roc, points: int = ROC_POINTS) -> Roc:
    """At most `points` of the ROC curve's points: spread evenly over log(FAR), and over TAR; the ends are kept."""
    if len(roc.far) <= points:
        return roc
    smallest = roc.far[roc.far > 0][0]
    half = points // 2
    kept = np.concatenate(
        [
            [0, len(roc.far) - 1],
            np.searchsorted(roc.far, np.geomspace(smallest, 1, half - 1)).clip(max=len(roc.far) - 1),
            np.searchsorted(roc.tar, np.linspace(0, 1, half - 1)).clip(max=len(roc.tar) - 1),
        ]
    )
    kept = np.unique(kept)
    return Roc(roc.far[kept], roc.tar[kept])


@mpl.rc_context(STYLE)
def roc_figure(metrics: Metrics) -> Figure:
    """TAR over FAR (log scale), from the smallest FAR that the pairs can resolve, with the asked TAR@FAR marked."""
    figure, axes = _axes()
    roc = thin(metrics.roc)
    smallest = metrics.roc.far[metrics.roc.far > 0][0]
    axes.plot(np.maximum(roc.far, smallest / 2), roc.tar, color=SAME, drawstyle="steps-post", solid_joinstyle="round")
    for far, tar in metrics.tar_at_far.items():
        if tar is not None:
            axes.plot(float(far), tar, "o", color=SAME, markersize=5.5)
            axes.annotate(
                f"{tar:.1%}", (float(far), tar), xytext=(5, -12), textcoords="offset points", color=INK, fontsize=8.5
            )
    lowest = np.floor(10 * roc.tar[roc.far > 0][0] - 1) / 10
    axes.set(xscale="log", xlim=(smallest / 1.5, 1.1), ylim=(max(0, lowest), 1.02))
    axes.set(xlabel="false accept rate", ylabel="true accept rate")
    axes.xaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_formatter(PERCENT)
    return figure


@mpl.rc_context(STYLE)
def scores_figure(scores: NDArray, same: NDArray, threshold: float) -> Figure:
    """Histogram of the scores of same and of different pairs, with the threshold."""
    figure, axes = _axes()
    edges = np.histogram_bin_edges(scores, bins=50).tolist()
    for flags, colour, label in ((~same, DIFFERENT, "different people"), (same, SAME, "same person")):
        axes.hist(scores[flags], edges, color=colour, alpha=0.6, label=label)
    axes.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="threshold")
    axes.set(xlabel="score (cosine)", ylabel="pairs")
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, columnspacing=1.1, handlelength=1.2, handletextpad=0.5)
    return figure


@mpl.rc_context(STYLE)
def folds_figure(metrics: Metrics) -> Figure:
    """Accuracy of each fold, with mean and standard error."""
    figure, axes = _axes()
    accuracy = np.array(metrics.fold_accuracy)
    labels = [str(number + 1) for number in metrics.folds]
    axes.axhspan(
        metrics.accuracy - metrics.accuracy_se,
        metrics.accuracy + metrics.accuracy_se,
        color=SAME,
        alpha=0.18,
        linewidth=0,
    )
    axes.axhline(metrics.accuracy, color=SAME, linewidth=1.2)
    axes.plot(labels, accuracy, "o", color=SAME, markersize=6)
    margin = max(0.02, 0.35 * float(np.ptp(accuracy)))
    axes.set_ylim(accuracy.min() - margin, min(accuracy.max() + margin, 1.005))
    axes.set(xlabel="fold", ylabel="accuracy")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", visible=False)
    return figure


@mpl.rc_context(STYLE)
def training_figure(
    iteration: Sequence[int],
    *curves: tuple[str, Sequence[float | None], str],
    log: bool = False,
    share: bool = False,
) -> Figure:
    """Curves over training iterations.

    Args:
        iteration: of each row of history.csv.
        curves: label, values (None where a row has none) and colour of each.
        log: logarithmic scale.
        share: values are shares, shown in per cent.
    """
    figure, axes = _axes()
    for label, values, colour in curves:
        points = [(x, y) for x, y in zip(iteration, values, strict=True) if y is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label)
    axes.set(xlabel="iteration")
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if share:
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PERCENT)
    if len(curves) > 1:
        axes.legend(loc="lower right", fontsize=8.5)
    return figure


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


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.2, 3.1), layout="constrained")
    return figure, figure.add_subplot()
