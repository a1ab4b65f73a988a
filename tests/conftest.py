"""Shared fixtures: tiny seeded models on disk and in memory."""

import os
import shutil

import pytest
import torch
from chat_models import chatting, saved
from tiny_runs import band_settings, blank_figures, run, tiny_settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from support.tiny_models import CONTEXT, tiny_model, tiny_tokenizer

N_THREADS = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
SENTENCES = [
    "the cat sat on the mat",
    "a dog ran in the park",
    "the naïve café was closed on the day",
    "the dog and the cat ran on a day in the café",
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one thread: tiny models gain nothing from a second one, and lose much where other programs run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def all_threads():
    """Give real models a share of the cores, since processes that compete for cores are slower than one."""
    torch.set_num_threads(N_THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def word_tokenizer():
    """One token for each word of SENTENCES, <unk> for other words; no token comes first."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    trainer = trainers.WordLevelTrainer(special_tokens=list(names.values()), show_progress=False)
    words.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=CONTEXT, **names)


@pytest.fixture(scope="session")
def bpe_tokenizer():
    """Byte-level with a few merges; " 🙂" is 3 tokens, the first of which ends inside the character."""
    merges = "t h,th e,Ġ the,a t,c at,Ġ cat,o g,d og,Ġ dog,Ġ ð,Ġð Ł,c a,ca f".split(",")
    symbols = ["<bos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [pair.replace(" ", "") for pair in merges]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    merged = Tokenizer(models.BPE(vocabulary, [tuple(pair.split()) for pair in merges]))
    merged.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merged.decoder = decoders.ByteLevel()
    merged.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    names = {"bos_token": "<bos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=merged, model_max_length=CONTEXT, **names)


class CharacterTokenizer(PreTrainedTokenizer):
    """Written in Python, so it gives no offsets; one token for each character."""

    vocab_size = 256

    def get_vocab(self):
        return {chr(code): code for code in range(256)}

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return min(ord(token), 255)

    def _convert_id_to_token(self, index):
        return chr(index)


@pytest.fixture(scope="session")
def slow_tokenizer():
    return CharacterTokenizer(pad_token="\x00", unk_token="\x01", model_max_length=CONTEXT)


@pytest.fixture(scope="session")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """Two tiny models of different width and family, saved as `load_model` reads them."""
    folder = tmp_path_factory.mktemp("models")
    models = {"source": tiny_model("llama"), "target": tiny_model("gpt2", seed=1, n_embd=48)}
    return {name: saved(model, folder / name) for name, model in models.items()}


@pytest.fixture(scope="session")
def chat_target(tmp_path_factory):
    """The same target with a chat template."""
    return saved(tiny_model("gpt2", seed=1, n_embd=48), tmp_path_factory.mktemp("chat"), chatting())


@pytest.fixture(scope="session")
def tiny(model_folders, tmp_path_factory):
    """The configuration of a run of seconds, without output_dir."""
    return tiny_settings(model_folders, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The folder of a whole run of it, which no test changes."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert run(folder, tiny) == 0
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it, to be continued or damaged."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture(scope="session")
def band(tiny, chat_target):
    """The configuration of a band with a chat target, responses and searched alphas."""
    return band_settings(tiny, chat_target)


@pytest.fixture(scope="session")
def finished_band(band, tmp_path_factory):
    """The folder of a whole run of it, which no test changes."""
    folder = tmp_path_factory.mktemp("finished_band") / "out"
    assert run(folder, band) == 0
    return folder


@pytest.fixture
def no_drawing(monkeypatch):
    """Runs save figures without content."""
    blank_figures(monkeypatch)
