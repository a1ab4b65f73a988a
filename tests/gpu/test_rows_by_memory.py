"""On CUDA devices batches have the rows that fit, and a run that goes on has those of its start."""

from contextlib import closing

import pytest
from accelerate import dispatch_model
from fake_cuda import fake_cuda

from decoding.memory import MEMORY_SHARE, MOST_ROWS, LongestRow, row_bytes, rows_that_fit
from experiment.batch_sizes import with_batch_sizes
from experiment.config import ROWS, load_config
from experiment.executor import start_executor
from experiment.inputs import load_inputs
from experiment.run import Run
from model_loading import decoder_blocks
from support.run_folder import RunFolder
from support.tiny_models import tiny_model

LONGEST = LongestRow(30, 1, 60)


def fitting(model, longest=LONGEST):
    return rows_that_fit(model, decoder_blocks(model), longest, MOST_ROWS)


@pytest.mark.parametrize(("asked", "expected"), [(1000, MOST_ROWS), (100, 96), (17, 16), (5, 5), (0.1, 1)])
def test_rows_are_those_that_fit_in_multiples_that_halve_and_at_most_480(asked, expected):
    row = row_bytes(tiny_model().config, tiny_model().dtype, LONGEST)
    with fake_cuda(free=[int(asked * row / MEMORY_SHARE) + 1]):
        assert fitting(tiny_model().to("cuda")) == expected


def test_of_several_devices_the_fullest_decides_and_each_has_the_cache_of_its_blocks():
    model, size = tiny_model(), 5 * 10**7
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    places |= {f"model.layers.{index}": int(index == 3) for index in range(4)}

    def fits(free, cached):
        with fake_cuda(2, free):
            model = dispatch_model(tiny_model(), places)
            return fitting(model, LongestRow(1, 0, cached))

    alone = MEMORY_SHARE * size / row_bytes(model.config, model.dtype, LongestRow(1, 0, 1000))
    # Of four blocks three are on the first device.
    assert fits([size, 10 * size], 1000) == pytest.approx(alone * 4 / 3, rel=0.1)
    assert fits([10 * size, size], 1000) == pytest.approx(alone * 4, rel=0.1)
    with fake_cuda(2, [size, 4 * 10**5]):
        assert fitting(dispatch_model(tiny_model(), places)) < 32  # whose logits are on the second


def started(settings, folder, **changes):
    inputs = load_inputs(load_config({**settings, **changes, "output_dir": str(folder)}))
    with closing(RunFolder(folder)) as opened:
        return with_batch_sizes(Run(inputs, opened, start_executor(inputs)))


def rows_of(run):
    return {key: getattr(run.config, key) for key in ROWS}


def test_a_run_keeps_the_rows_of_its_start(tiny, tmp_path):
    settings = {**tiny, "device": "cuda", "dtype": "float32", "evaluation_batch_size": 3}
    with fake_cuda():
        found = started(settings, tmp_path)
        assert rows_of(found) == {
            "extraction_batch_size": 64,
            "generation_batch_size": 480,
            "evaluation_batch_size": 3,
        }
        assert found.inputs.source.extractor.batch_size == found.inputs.target.extractor.batch_size == 64
    with fake_cuda(free=[10**8]):
        assert rows_of(started(settings, tmp_path)) == rows_of(found)
        fewer = rows_of(started(settings, tmp_path / "other"))
        longer = rows_of(started(settings, tmp_path, max_new_tokens=90))
    assert 1 < longer["generation_batch_size"] < fewer["generation_batch_size"] < 480
    assert fewer["evaluation_batch_size"] == 3


def test_without_such_a_device_nothing_is_written_and_rows_are_what_they_were(tiny, tmp_path):
    assert list(rows_of(started(tiny, tmp_path / "a")).values()) == [8, 32, 8]
    assert rows_of(started({**tiny, **dict.fromkeys(ROWS, "auto")}, tmp_path / "b")) == ROWS
    assert not (tmp_path / "a").exists()
