"""Workers have a cluster's GPUs, the process that was started none. Ray counts them; they are not there."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from experiment import executor as executors
from experiment import models
from experiment.config import load_config
from experiment.executor import LocalExecutor, Worker, collect_in_chunks, read_by_workers
from experiment.inputs import load_inputs
from experiment.models import load_side, on_driver
from experiment.ray_executor import Place, RayExecutor, has_gpus, plan_places
from maps.pair_collection import PairSettings
from support.errors import InputError
from texts.neutral_text import NeutralText

TEXTS = [NeutralText(f"Text {number} of {number * number}.", f"document {number}") for number in range(25)]
PAIRS = PairSettings(((1, 2),), "last", n_folds=3)


class Placed:
    """Says where it is; at the first call of `hold` it waits to be killed."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def place(self, seconds):
        import ray

        time.sleep(seconds)
        return ray.get_runtime_context().get_node_id(), tuple(ray.get_gpu_ids()), os.getpid()

    def hold(self, number):
        if number == 0 and not (self.folder / "held").exists():
            part = self.folder / "part"
            part.write_text(str(os.getpid()))
            part.rename(self.folder / "held")  # in one step, since the test reads it as soon as it is there
            time.sleep(60)
        return number, self.place(0)[1]


@pytest.fixture(scope="module")
def gpu_node():
    """The id of a node with four GPUs, beside a head node without one."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    node = cluster.add_node(num_cpus=4, num_gpus=4)
    ray.init(address=cluster.address, log_to_driver=False)
    yield node.node_id
    ray.shutdown()
    cluster.shutdown()


class Elsewhere(LocalExecutor):
    """Notes how many chunks come, as if workers elsewhere had the GPUs."""

    n_workers, has_gpus = 2, True

    def __init__(self, worker):
        super().__init__(worker)
        self.n_chunks = []

    def run(self, method, chunks):
        self.n_chunks.append(len(chunks))
        return super().run(method, chunks)


@pytest.fixture
def config(tiny):
    return load_config({**tiny, "output_dir": "x", "executor": {"kind": "ray", "n_workers": 2}})


def test_workers_have_gpus_of_their_own_beside_a_head_without_one_and_a_killed_one_has_them_again(
    gpu_node, tmp_path
):
    assert has_gpus()
    with RayExecutor(partial(Placed, tmp_path), gpus_per_worker=2) as executor:
        assert (executor.n_workers, executor.has_gpus) == (2, True)
        places = [place for _, place in executor.run("place", [(2,)] * 2)]
        nodes, gpus, _ = zip(*places, strict=True)
        assert set(nodes) == {gpu_node}
        assert sorted(sum(gpus, ())) == [0, 1, 2, 3]
        results = executor.run("hold", [(number,) for number in range(4)])
        found = [next(results)]
        while not (tmp_path / "held").exists():
            time.sleep(0.05)
        os.kill(int((tmp_path / "held").read_text()), signal.SIGKILL)
        found += results
    assert sorted(index for index, _ in found) == [0, 1, 2, 3]
    assert {of_worker for _, (_, of_worker) in found} == set(gpus)


def test_two_gpus_of_a_worker_are_on_one_node_and_come_with_their_share_of_its_cpus():
    resources = {"head": {"CPU": 8}, "a": {"CPU": 8, "GPU": 4}, "b": {"CPU": 4, "GPU": 3}}
    nodes = [{"NodeID": name, "Alive": True, "Resources": each} for name, each in resources.items()]
    assert plan_places(nodes, None, 2) == [Place("a", 4, 2), Place("a", 4, 2), Place("b", 4, 2)]
    with pytest.raises(
        InputError, match="each needs 5 GPUs on one node and the cluster has room for 0; lower"
    ):
        plan_places(nodes, None, 5)


def test_the_process_that_was_started_takes_no_gpu_and_the_dtype_is_a_workers(config, monkeypatch):
    monkeypatch.setattr(models, "has_gpus", lambda address: True)
    places = [on_driver(config).place_of(f"{side}_model") for side in ("source", "target")]
    assert [(place.device, place.dtype) for place in places] == [("cpu", "bfloat16")] * 2
    inputs = load_inputs(config)
    assert [side.model.dtype for side in inputs.sides] == [torch.bfloat16] * 2
    assert inputs.config == config


def test_workers_read_what_is_read_here_and_each_sends_its_sums_once(tiny, monkeypatch):
    monkeypatch.setattr(executors, "EXTRACTION_CHUNK", 10)
    inputs = load_inputs(load_config({**tiny, "output_dir": "x"}))
    worker = Worker({side.name: side for side in inputs.sides})
    elsewhere, texts = Elsewhere(worker), [item.text for item in TEXTS]
    read = read_by_workers(inputs, elsewhere).source.at_layer(2).extractor.extract_batch(texts, "mean")
    assert torch.allclose(read, inputs.source.at_layer(2).extractor.extract_batch(texts, "mean"), atol=1e-5)
    assert read_by_workers(inputs, LocalExecutor(worker)) is inputs
    found, expected = (collect_in_chunks(each, TEXTS, PAIRS) for each in (elsewhere, LocalExecutor(worker)))
    assert elsewhere.n_chunks == [3, 2]  # of texts that are read, and of sums
    assert found.report() == expected.report()
    found, expected = (each.statistics[1, 2] for each in (found, expected))
    assert torch.equal(found.sample.rows, expected.sample.rows)
    assert torch.allclose(found.total().cross, expected.total().cross, rtol=0, atol=1e-9)


def test_workers_on_cpus_leave_the_models_where_they_are_configured(config, monkeypatch):
    monkeypatch.setattr(models, "has_gpus", lambda address: False)
    assert on_driver(config) is config
    assert load_side(on_driver(config), "source").model.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"device": "cuda:1"},
            "source_model is to be on cuda:1, but a Ray worker has 1 GPU, numbered from 0",
        ),
        ({"quantization": "8bit"}, "source_model with quantization '8bit': .* takes no GPU"),
    ],
)
def test_what_no_worker_can_do_is_one_line(change, message):
    names = {"source_model": {"name": "a", **change}, "target_model": "b", "output_dir": "c", "layer_idx": 1}
    with pytest.raises(InputError, match=message):
        load_config({**names, "executor": {"kind": "ray"}})
    if "device" in change:
        load_config({**names, "executor": {"kind": "ray", "gpus_per_worker": 2}})
