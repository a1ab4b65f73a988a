import logging

import torch
from tiny_runs import error_lines, run, visible_files

from analysis import checklist
from analysis.checklist import Check, failures
from phases.check_setup import report
from support.artifacts import load_json

CHECKS = [
    Check("good", True, "pass", "fine", ""),
    Check("premise", False, "fail", "noisy", "more texts"),
    Check("later", False, "pending", "to come", ""),
]


def test_failures_are_lines_for_the_summary_and_warnings_in_the_log(caplog):
    caplog.set_level(logging.INFO)
    rows = report(CHECKS)
    assert failures(rows) == ["premise failed: noisy. Try: more texts"]
    assert failures(rows, technical_only=True) == []
    levels = {record.getMessage().split()[2]: record.levelname for record in caplog.records}
    assert levels == {"good:": "INFO", "premise:": "WARNING", "later:": "INFO"}


def test_a_failed_technical_check_stops_the_run_and_is_made_again(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(checklist, "EXACT_TOLERANCE", {torch.float32: 0.0})
        assert run(out, tiny) == 1
    assert error_lines(capsys)[0].startswith("error: preflight: source_extraction failed")
    assert visible_files(out) == {"config.json", "native_vectors.pt", "preflight.json", "experiment.log"}
    assert run(out, tiny, "--phase", "1") == 0
    checks = load_json(out / "preflight.json")["checks"]
    assert all(check["status"] == "pass" for check in checks if check["technical"])
