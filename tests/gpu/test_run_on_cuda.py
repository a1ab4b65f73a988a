"""A whole run by CUDA's rules: all five phases pass, and give what they give on the CPU."""

from fake_cuda import fake_cuda
from tiny_runs import artifacts, blank_figures, is_close, run, score_by_characters, texts

from decoding.memory import MOST_ROWS


def test_a_whole_run_on_a_device_gives_what_it_gives_on_the_cpu(tiny, tmp_path, monkeypatch):
    blank_figures(monkeypatch)
    score_by_characters(monkeypatch)
    settings = {**tiny, "dtype": "float32"}
    assert run(tmp_path / "cpu", {**settings, "device": "cpu"}) == 0
    with fake_cuda() as device:
        assert run(tmp_path / "cuda", {**settings, "device": "cuda"}) == 0
        assert device.n_launches > 10_000
    assert texts(tmp_path / "cuda") == texts(tmp_path / "cpu")
    found, expected = (artifacts(tmp_path / folder) for folder in ("cuda", "cpu"))
    assert found.pop("batch_sizes.json")["rows"]["generation_batch_size"] == MOST_ROWS
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert is_close(found[name], content), name
