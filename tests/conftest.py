"""Shared fixtures: tiny seeded models on disk and in memory."""

import pytest
import torch

from tiny_models import tiny_model, tiny_tokenizer

N_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models gain nothing from a second thread, and lose much where other programs run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def all_threads():
    """For the real models."""
    torch.set_num_threads(N_THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """Two tiny models of different width and family, saved as `load_model` reads them."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("source", tiny_model("llama")), ("target", tiny_model("gpt2", seed=1, n_embd=48))):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return {"source": str(folder / "source"), "target": str(folder / "target")}
