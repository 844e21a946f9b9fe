import logging

import pytest

from pipeline import progress


def test_without_a_terminal_there_are_plain_lines_with_rate_and_estimate(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with caplog.at_level(logging.INFO):
        assert list(progress.progress(iter(range(5)), total=5, label="counting", unit="sheep")) == list(range(5))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[-1].startswith("counting: 5/5 sheep, ")
    assert all("so far" in line and "left" in line for line in lines)
    assert len(lines) == len(set(lines))
    assert capsys.readouterr() == ("", "")
