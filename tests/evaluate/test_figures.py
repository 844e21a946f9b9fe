"""Thinned curves, what figures draw, and that they are the same every time."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from pipeline.pages import DIFFERENT, SAME, save_png, to_svg
from stages.evaluate import figures
from stages.evaluate.verification import Metrics, Roc, evaluate

Scores = tuple[NDArray[np.float64], NDArray[np.bool_], Metrics]


@pytest.fixture(scope="module")
def measured() -> Scores:
    """Overlapping scores, their truths, and what is measured of them in folds of unequal accuracy."""
    rng = np.random.default_rng(1)
    same = np.arange(400) % 2 == 0
    scores = np.where(same, 0.5, 0.1) + rng.normal(0, 0.15, 400)
    return scores, same, evaluate(scores, same, np.arange(400) // 40, [0.1, 0.01, 0.001])


def drawn(figure: Figure) -> tuple[Axes, list[NDArray[np.float64]]]:
    """The axes, and (points, 2) of each line."""
    (axes,) = figure.axes
    return axes, [np.array(line.get_xydata(), float) for line in axes.lines]


def curve(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(points, 2) FAR and TAR, by scikit-learn."""
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    return np.stack([far, tar], axis=1)


def test_thinned_curve_keeps_ends_order_and_small_rates() -> None:
    rng = np.random.default_rng(1)
    full = Roc(np.sort(np.append(rng.random(20_000), [0, 1])), np.sort(np.append(rng.random(20_000), [0, 1])))
    few = figures.thin(full)
    assert len(few.far) <= figures.ROC_POINTS
    assert (few.far[0], few.tar[0], few.far[-1], few.tar[-1]) == (0, 0, 1, 1)
    assert (np.diff(few.far) >= 0).all()
    assert (np.diff(few.tar) >= 0).all()
    assert set(zip(few.far, few.tar, strict=True)) <= set(zip(full.far, full.tar, strict=True))
    below = few.far[few.far <= 0.01]
    assert below[1] == full.far[1]  # the smallest rate there is
    assert np.abs(np.interp(full.far, few.far, few.tar) - full.tar).max() < 0.005


def test_short_curve_stays() -> None:
    roc = Roc(np.array([0, 0.5, 1]), np.array([0, 1, 1]))
    assert figures.thin(roc) is roc


def test_roc_figure_is_scikit_learns_curve(measured: Scores) -> None:
    scores, same, metrics = measured
    axes, (line, *marks) = drawn(figures.roc_figure(metrics))
    expected = curve(scores, same)
    first = 0.5 / np.count_nonzero(~same)  # what is at 0 stands left of the least rate there is
    assert line == pytest.approx(np.stack([np.maximum(expected[:, 0], first), expected[:, 1]], axis=1))
    reached = [(far, expected[expected[:, 0] <= far + 1e-12, 1].max()) for far in (0.1, 0.01)]  # 0.001 has no pairs
    assert np.concatenate(marks) == pytest.approx(np.array(reached))
    assert [text.get_text() for text in axes.texts] == [f"{tar:.1%}" for _, tar in reached]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("false accept rate", "true accept rate")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert first < left < 2 * first  # it comes in from the left
    assert right > 1
    assert bottom < line[line[:, 0] > first, 1].min()
    assert top > 1


def test_det_figure_is_false_rejects_over_false_accepts(measured: Scores) -> None:
    scores, same, metrics = measured
    axes, (line, diagonal, mark) = drawn(figures.det_figure(metrics))
    expected = curve(scores, same) * [1, -1] + [0, 1]
    assert line == pytest.approx(expected[(expected[:, 0] > 0) & (expected[:, 1] > 0)])
    assert (diagonal[:, 0] == diagonal[:, 1]).all()
    ((eer, again),) = mark
    assert eer == again
    nearest = np.abs(expected[:, 0] - expected[:, 1]).argmin()
    assert eer == pytest.approx(expected[nearest].mean(), abs=1 / 200)  # of 200 pairs of each kind
    assert [text.get_text() for text in axes.texts] == [f"EER {eer:.1%}"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("false accept rate", "false reject rate")


def test_scores_figure_counts_every_pair_once(measured: Scores) -> None:
    scores, same, metrics = measured
    axes, (line,) = drawn(figures.scores_figure(scores, same, metrics.threshold))
    assert (line[:, 0] == metrics.threshold).all()
    assert len(axes.containers) == 2
    wanted = (("different people", DIFFERENT, ~same), ("same person", SAME, same))
    for bars, (label, colour, flags) in zip(axes.containers, wanted, strict=True):
        assert isinstance(bars, BarContainer)
        assert bars.patches[0].get_label() == label  # it stands for all in the legend
        own = scores[flags]
        for bar in bars.patches:
            assert isinstance(bar, Rectangle)
            low, high = bar.get_x(), bar.get_x() + bar.get_width()
            upper = own <= high if bar is bars.patches[-1] else own < high - 1e-12
            assert bar.get_height() == ((own >= low - 1e-12) & upper).sum()
            assert to_hex(bar.get_facecolor()) == colour
        assert sum(bar.get_height() for bar in bars.patches) == 200
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("score (cosine)", "pairs")


def test_folds_figure_shows_each_fold_mean_and_standard_error(measured: Scores) -> None:
    scores, same, metrics = measured
    axes, (mean, folds) = drawn(figures.folds_figure(metrics))
    accuracy = []
    for number, threshold in enumerate(metrics.fold_threshold):
        own = slice(40 * number, 40 * number + 40)
        accuracy.append(np.mean((scores[own] >= threshold) == same[own]))
    assert len(set(accuracy)) > 2
    assert folds == pytest.approx(np.stack([np.arange(10), accuracy], axis=1))
    assert [text.get_text() for text in axes.get_xticklabels()] == [str(number) for number in range(1, 11)]
    assert mean[:, 1] == pytest.approx(np.full(2, np.mean(accuracy)))
    (band,) = axes.patches
    assert isinstance(band, Rectangle)
    error = np.std(accuracy, ddof=1) / 10**0.5
    assert band.get_y() == pytest.approx(np.mean(accuracy) - error)
    assert band.get_height() == pytest.approx(2 * error)
    bottom, top = axes.get_ylim()
    assert bottom < min(accuracy)
    assert top > max(accuracy)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("fold", "accuracy")


def test_training_figure_leaves_out_rows_without_a_value() -> None:
    figure = figures.training_figure(
        [10, 20, 30], ("training", [0.2, 0.6, 0.8], SAME), ("validation", [None, 0.5, None], DIFFERENT), share=True
    )
    axes, lines = drawn(figure)
    assert [line.tolist() for line in lines] == [[[10, 0.2], [20, 0.6], [30, 0.8]], [[20, 0.5]]]
    assert [line.get_label() for line in axes.lines] == ["training", "validation"]
    assert [line.get_color() for line in axes.lines] == [SAME, DIFFERENT]
    assert axes.get_ylim() == (0, 1.03)
    assert axes.get_xlabel() == "iteration"
    axes, lines = drawn(figures.training_figure([10, 20], ("rate", [0.1, 0.01], SAME), log=True))
    assert [line.tolist() for line in lines] == [[[10, 0.1], [20, 0.01]]]
    assert axes.get_yscale() == "log"


def test_cmc_figure_has_a_curve_for_each_number_of_distractors() -> None:
    axes, lines = drawn(figures.cmc_figure({10: [0.5, 0.75, 1], 1000: [0.25, 0.25, 0.5]}))
    assert [line.tolist() for line in lines] == [
        [[1, 0.5], [2, 0.75], [3, 1]],
        [[1, 0.25], [2, 0.25], [3, 0.5]],
    ]
    assert [line.get_label() for line in axes.lines] == ["10", "1,000"]
    assert (axes.get_xscale(), axes.get_xlim()) == ("log", (1, 100))
    axes, lines = drawn(figures.cmc_figure({}))
    assert not lines
    assert [text.get_text() for text in axes.texts] == ["not measured"]


def test_map_figure_has_each_person_in_a_look_of_their_own() -> None:
    rng = np.random.default_rng(2)
    points, people = rng.normal(size=(50, 2)), np.arange(50) % 25
    (axes,) = figures.map_figure(points, people).axes
    looks = set()
    for person, shown in enumerate(axes.collections):
        assert isinstance(shown, PathCollection)
        assert np.array(shown.get_offsets()) == pytest.approx(points[people == person])
        looks.add((tuple(np.ravel(shown.get_facecolor())), np.asarray(shown.get_paths()[0].vertices).tobytes()))
    assert len(axes.collections) == len(looks) == 25


def test_figures_are_the_same_every_time(measured: Scores, tmp_path: Path) -> None:
    scores, same, metrics = measured
    made = {}
    for attempt in (1, 2):
        drawn = (
            figures.roc_figure(metrics),
            figures.scores_figure(scores, same, metrics.threshold),
            figures.folds_figure(metrics),
        )
        save_png(drawn[0], tmp_path / "roc.png")
        made[attempt] = ((tmp_path / "roc.png").read_bytes(), [to_svg(figure, "a") for figure in drawn])
    assert made[1] == made[2]
    for svg in made[1][1]:
        assert svg.startswith("<svg")
        assert "#0f7a6c" not in svg  # the page's variables decide
        assert "var(--same)" in svg
