"""Thinned curves, and figures that are the same every time."""

from pathlib import Path

import numpy as np

from pipeline.pages import save_png, to_svg
from stages.evaluate import figures
from stages.evaluate.verification import Roc, evaluate


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


def test_figures_are_the_same_every_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    same = np.arange(400) % 2 == 0
    scores = np.where(same, 0.5, 0.1) + rng.normal(0, 0.15, 400)
    metrics = evaluate(scores, same, np.arange(400) // 40, [0.1, 0.01, 0.001])
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
