"""The figures of the evaluation."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from pipeline.pages import DIFFERENT, INK, MUTED, PERCENT, SAME, STYLE, axes
from stages.evaluate.verification import Metrics, Roc

ROC_POINTS = 1000


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
    figure, plot = axes()
    roc = thin(metrics.roc)
    smallest = metrics.roc.far[metrics.roc.far > 0][0]
    plot.plot(np.maximum(roc.far, smallest / 2), roc.tar, color=SAME, drawstyle="steps-post", solid_joinstyle="round")
    for far, tar in metrics.tar_at_far.items():
        if tar is not None:
            plot.plot(float(far), tar, "o", color=SAME, markersize=5.5)
            plot.annotate(
                f"{tar:.1%}", (float(far), tar), xytext=(5, -12), textcoords="offset points", color=INK, fontsize=8.5
            )
    lowest = np.floor(10 * roc.tar[roc.far > 0][0] - 1) / 10
    plot.set(xscale="log", xlim=(smallest / 1.5, 1.1), ylim=(max(0, lowest), 1.02))
    plot.set(xlabel="false accept rate", ylabel="true accept rate")
    plot.xaxis.set_major_formatter(PERCENT)
    plot.yaxis.set_major_formatter(PERCENT)
    return figure


@mpl.rc_context(STYLE)
def det_figure(metrics: Metrics) -> Figure:
    """Both errors over the threshold: false rejects over false accepts (DET), on logarithmic scales."""
    figure, plot = axes()
    roc = thin(metrics.roc)
    inside = (roc.far > 0) & (roc.tar < 1)
    if not inside.any():
        plot.text(0.5, 0.5, "no errors to draw", transform=plot.transAxes, ha="center", color=INK)
        return figure
    far, frr = roc.far[inside], 1 - roc.tar[inside]
    plot.plot(far, frr, color=SAME, drawstyle="steps-post", solid_joinstyle="round")
    least = float(min(far.min(), frr.min()))
    plot.plot([least, 1], [least, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    plot.plot(metrics.eer, metrics.eer, "o", color=SAME, markersize=5.5)
    where = (metrics.eer, metrics.eer)
    plot.annotate(f"EER {metrics.eer:.1%}", where, xytext=(6, 4), textcoords="offset points", color=INK, fontsize=8.5)
    plot.set(xscale="log", yscale="log", xlim=(far.min() / 1.5, 1.1), ylim=(frr.min() / 1.5, 1.1))
    plot.set(xlabel="false accept rate", ylabel="false reject rate")
    plot.xaxis.set_major_formatter(PERCENT)
    plot.yaxis.set_major_formatter(PERCENT)
    return figure


@mpl.rc_context(STYLE)
def map_figure(points: NDArray[np.floating], people: NDArray[np.integer]) -> Figure:
    """Faces on a plane, those of a person in one colour and shape.

    Args:
        points: (N, 2).
        people: (N,) who is on each, from 0.
    """
    figure, plot = axes()
    for person in np.unique(people).tolist():
        own = points[people == person]
        colour = mpl.colormaps["tab20"](person % 20)
        plot.scatter(own[:, 0], own[:, 1], s=16, marker="osD^v"[person // 20 % 5], color=[colour], linewidths=0)
    plot.set(xticks=[], yticks=[])
    plot.grid(visible=False)
    return figure


@mpl.rc_context(STYLE)
def scores_figure(scores: NDArray, same: NDArray, threshold: float) -> Figure:
    """Histogram of the scores of same and of different pairs, with the threshold."""
    figure, plot = axes()
    edges = np.histogram_bin_edges(scores, bins=50).tolist()
    for flags, colour, label in ((~same, DIFFERENT, "different people"), (same, SAME, "same person")):
        plot.hist(scores[flags], edges, color=colour, alpha=0.6, label=label)
    plot.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="threshold")
    plot.set(xlabel="score (cosine)", ylabel="pairs")
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, columnspacing=1.1, handlelength=1.2, handletextpad=0.5)
    return figure


@mpl.rc_context(STYLE)
def folds_figure(metrics: Metrics) -> Figure:
    """Accuracy of each fold, with mean and standard error."""
    figure, plot = axes()
    accuracy = np.array(metrics.fold_accuracy)
    labels = [str(number + 1) for number in metrics.folds]
    plot.axhspan(
        metrics.accuracy - metrics.accuracy_se,
        metrics.accuracy + metrics.accuracy_se,
        color=SAME,
        alpha=0.18,
        linewidth=0,
    )
    plot.axhline(metrics.accuracy, color=SAME, linewidth=1.2)
    plot.plot(labels, accuracy, "o", color=SAME, markersize=6)
    margin = max(0.02, 0.35 * float(np.ptp(accuracy)))
    plot.set_ylim(accuracy.min() - margin, min(accuracy.max() + margin, 1.005))
    plot.set(xlabel="fold", ylabel="accuracy")
    plot.yaxis.set_major_formatter(PERCENT)
    plot.yaxis.set_major_locator(MaxNLocator(6))
    plot.grid(axis="x", visible=False)
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
    figure, plot = axes()
    for label, values, colour in curves:
        points = [(x, y) for x, y in zip(iteration, values, strict=True) if y is not None]
        if points:
            plot.plot(*zip(*points, strict=True), color=colour, label=label)
    plot.set(xlabel="iteration")
    if log:
        plot.set_yscale("log")
        plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if share:
        plot.set_ylim(0, 1.03)
        plot.yaxis.set_major_formatter(PERCENT)
    if len(curves) > 1:
        plot.legend(loc="lower right", fontsize=8.5)
    return figure


@mpl.rc_context(STYLE)
def cmc_figure(shares: Mapping[int, Sequence[float]]) -> Figure:
    """Share of probes whose mate is among the first so many of the gallery (CMC), by number of distractors.

    Args:
        shares: at rank 1, 2, ..., by number of distractors; empty where nothing was measured.
    """
    figure, plot = axes()
    for shade, (count, values) in zip(np.linspace(0.35, 1, max(len(shares), 1)), shares.items(), strict=False):
        ranks = np.arange(1, len(values) + 1)
        plot.plot(ranks, values, color=SAME, alpha=float(shade), drawstyle="steps-post", label=f"{count:,}")
    plot.set(xscale="log", xlim=(1, 100), ylim=(None, 1.02), xlabel="rank", ylabel="share of mates found")
    plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    plot.yaxis.set_major_formatter(PERCENT)
    if shares:
        plot.legend(title="distractors", loc="lower right", fontsize=8.5, title_fontsize=8.5)
    else:
        plot.text(0.5, 0.5, "not measured", transform=plot.transAxes, ha="center", color=INK)
    return figure
