"""What is to be measured on a GPU runs to its end on a device that is not there."""

import json
from pathlib import Path

from fake_cuda import fake_cuda

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_all_parts_run_and_write_their_results_at_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_gpu

    path = tmp_path / "new" / "results.jsonl"
    with fake_cuda():
        bench_gpu.main(["--tiny", "--output", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row for row in rows if "error" in row or "skipped" in row] == []
    found = {(row["part"], row.get("how") or row.get("place")) for row in rows}
    assert found >= {("steps", how) for how in ("usual", "graph", "model.generate")}
    assert found >= {("algebra", place) for place in ("cuda", "cpu")}
    assert {row["part"] for row in rows} >= {"machine", "ceilings", "texts", "scores", "sums"}
    assert [row["different"] for row in rows if row["part"] == "texts"] == [0, 0]
    (scores,) = [row for row in rows if row["part"] == "scores"]
    assert max(scores[name] for name in ("activations", "map", "perplexities")) < 1e-4


def test_an_error_ends_its_part_and_a_part_without_time_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_gpu

    def fails(bench):
        raise RuntimeError("a kernel that is not there")

    bench = bench_gpu.Bench(tmp_path / "results.jsonl", 10, "cpu", tiny=False)
    bench.run(fails, 1)
    bench.run(fails, 20)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["part"] for row in rows] == ["fails", "fails"]
    assert "kernel" in rows[0]["error"]
    assert rows[1]["skipped"] == "needs 20 s"
