"""A log has at least a line a minute that says what is done and what is left."""

import logging
import re
import time

import pytest

from support import progress
from support.progress import Bar, each, logged_progress, working


@pytest.fixture(autouse=True)
def often(monkeypatch, caplog):
    assert progress.LOG_EVERY < 60
    monkeypatch.setattr(progress, "LOG_EVERY", 0.02)
    caplog.set_level(logging.INFO)


def lines_of(caplog, wanted):
    """Wait for a line that matches, and return all so far."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = [record.getMessage() for record in caplog.records]
        if any(re.fullmatch(wanted, line) for line in found):
            return found
        time.sleep(0.01)
    raise AssertionError(found[-3:])


def test_a_line_says_what_is_done_and_what_is_left_of_every_open_task(caplog):
    with logged_progress(), working("phase 4 of 5, generate"), Bar(3600, "generating", "text", 100) as bar:
        lines_of(caplog, "after 0 min: phase 4 of 5, generate; generating: 100 of 3600 texts done, 3500 left")
        bar.update(20)
        lines_of(caplog, r".* generate; generating: 120 of 3600 texts done, 3480 left, about \d+ min")
        assert list(each("abc", "bands", "band")) == ["a", "b", "c"]
        with Bar(9, "perplexity", "text", quiet=True):
            lines_of(caplog, ".* generating: 120 of 3600 texts done, 3480 left, about .* min")
    assert not any("perplexity" in record.getMessage() for record in caplog.records)
    n_lines = len(caplog.records)
    time.sleep(0.1)
    assert len(caplog.records) == n_lines


def test_an_item_is_done_when_the_next_is_asked_for(caplog):
    with logged_progress():
        items = each(["a", "b"], "layer pairs", "pair")
        next(items)
        lines_of(caplog, "after 0 min: layer pairs: 0 of 2 pairs done, 2 left")
        next(items)
        lines_of(caplog, "after 0 min: layer pairs: 1 of 2 pairs done, 1 left, about 0 min")
        list(items)
        lines_of(caplog, "after 0 min: between two tasks")


def test_a_run_that_failed_leaves_no_task_to_the_next(caplog):
    left_open = each(["a", "b"], "bands", "band")
    with logged_progress():
        next(left_open)
        lines_of(caplog, ".* bands: .*")
    caplog.clear()
    with logged_progress():
        assert set(lines_of(caplog, ".*")) == {"after 0 min: between two tasks"}
    left_open.close()
