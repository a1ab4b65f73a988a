"""Compute what a run needs on GPUs: parameters, memory and minutes, for pairs of models of 1B, 7B and 70B.

    python benchmarks/cost_model.py

Nothing is measured, and all that is printed is computed: from the models' configurations, built without
weights; from the dry run's counts, to which computed rates are given; and from ASSUMPTIONS. Counts are those
of stand-ins of the models' depths, in whose texts a word is a token. Loading, waiting and a judge are left
out, and batches of searches hold fewer rows than a grid's, so that they take longer than this says.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from decoding.memory import EVEN, MEMORY_SHARE, MOST_ROWS, LongestRow, cache_bytes, row_bytes
from experiment.batch_sizes import longest_rows
from experiment.config import LAYER_KEYS, load_config
from experiment.executor import local_executor
from experiment.inputs import load_inputs
from experiment.run import Run
from model_loading import quiet_transformers
from reporting.tables import markdown_table
from support.run_folder import RunFolder
from support.text_files import parse_json, read_text
from support.tiny_models import tiny_model
from tools.dry_run import Rates, map_sums_bytes, run_steps

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
N_CARDS = 8
# The hub's text is not fetched for its number of tokens; these passages are nearly as many.
LOCAL = {"neutral_text": "wikipedia-sample", "n_training_samples": 4_900}
SHARDED_TO = (2, 4, N_CARDS)  # cards that hold a pair which one does not


class Assumptions(NamedTuple):
    """A card of the H100's kind, and what is reached on it."""

    memory: float = 80e9  # bytes of a card
    flops: float = 989e12  # a second, of products in bfloat16
    share: float = 0.4  # of these, that passes over whole texts and steps of many rows reach
    bandwidth: float = 3.35e12  # bytes a second
    launch: float = 6e-4  # seconds in which the host launches a block of a decoding step, hooks included
    algebra: float = 0.3e12  # operations a second of a float64 eigendecomposition, which has 9 d³
    products: float = 30e12  # the same of float64 products, which have 2 d³


ASSUMPTIONS = Assumptions()


@dataclass(frozen=True)
class Sized:
    """A model's configuration and its number of parameters."""

    config: PreTrainedConfig
    n_parameters: int

    @classmethod
    def of(cls, kind: str, **sizes: Any) -> "Sized":
        """Return what a model of these sizes has; it is built without weights."""
        config = AutoConfig.for_model(kind, **sizes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return cls(config, sum(parameter.numel() for parameter in model.parameters()))

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return 2 * self.n_parameters

    @property
    def token_seconds(self) -> float:
        """Seconds of a token that is read with others: two operations a parameter."""
        return 2 * self.n_parameters / (ASSUMPTIONS.flops * ASSUMPTIONS.share)

    def step_seconds(self, rows: int, length: int) -> float:
        """Return the seconds of a decoding step of many rows of this length: what takes longest."""
        launched = self.config.num_hidden_layers * ASSUMPTIONS.launch
        moved = self.n_bytes + rows * length * cache_bytes(self.config, torch.bfloat16)
        return max(launched, moved / ASSUMPTIONS.bandwidth, rows * self.token_seconds)


def sized(depth: int, width: int, inner: int, heads: int, groups: int, vocabulary: int, **more: Any) -> Sized:
    """Return a model of the Llama kind, by default with a head of its own."""
    sizes = {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": inner, **more}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary}
    return Sized.of(
        more.get("kind", "llama"), **{key: sizes[key] for key in sizes if key != "kind"}, **heads_of
    )


def shipped_models() -> dict[str, Sized]:
    """Return name -> model, of the sizes that are published."""
    qwen = {"kind": "qwen2"}
    tied = {"tie_word_embeddings": True}
    return {
        "Qwen2.5-1.5B": sized(28, 1536, 8960, 12, 2, 151_936, **qwen, **tied),
        "Llama-3.2-1B": sized(16, 2048, 8192, 32, 8, 128_256, **tied),
        "Qwen2.5-7B": sized(28, 3584, 18_944, 28, 4, 152_064, **qwen),
        "Llama-3.1-8B": sized(32, 4096, 14_336, 32, 8, 128_256),
        "Qwen2.5-72B": sized(80, 8192, 29_568, 64, 8, 152_064, **qwen),
        "Llama-3.1-70B": sized(80, 8192, 28_672, 64, 8, 128_256),
        "Qwen-7B": sized(32, 4096, 11_008, 32, 32, 151_936),
        "Llama-2-7B": sized(32, 4096, 11_008, 32, 32, 32_000),
    }


DEFAULT, SPECIFIED = "qwen2.5-7b_to_llama3.1-8b", "qwen7b_to_llama2_7b"
PAIRS = {  # (source, target) -> the shipped configuration whose run is computed
    ("Qwen2.5-1.5B", "Llama-3.2-1B"): DEFAULT,
    ("Qwen2.5-7B", "Llama-3.1-8B"): DEFAULT,
    ("Qwen2.5-72B", "Llama-3.1-70B"): DEFAULT,
    ("Qwen-7B", "Llama-2-7B"): SPECIFIED,
}


def word_tokenizer(is_chat: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word and mark."""
    whole = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 257}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", eos_token="<eos>")
    if is_chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    return tokenizer


def counted_run(settings: dict[str, Any], pair: tuple[Sized, Sized], folder: str) -> Run:
    """Return a run that nothing is left of, on stand-ins with the depths of a pair of models."""
    is_chat = not set(LAYER_KEYS) & settings.keys()
    local = LOCAL if settings.get("neutral_text") == "wikitext-103" else {}
    stand_ins = {}
    for seed, (side, of) in enumerate(zip(("source", "target"), pair, strict=True)):
        sizes = {"num_hidden_layers": of.config.num_hidden_layers, "max_position_embeddings": 10**5}
        stand_ins[side] = tiny_model("llama", seed, **sizes), word_tokenizer(is_chat)
    config = load_config({**settings, **local, "device": "cpu", "dtype": "float32", "output_dir": folder})
    inputs = load_inputs(config, stand_ins)
    return Run(inputs, RunFolder(Path(folder)), local_executor(inputs))


@dataclass(frozen=True)
class Cost:
    """What a run needs; memory in bytes. n_shards: cards that hold both models."""

    n_texts: int
    weights: int
    n_shards: int
    rows: int
    batch: int
    sums: int
    minutes: float
    minutes_on_all: float


def cost_of(settings: dict[str, Any], pair: tuple[Sized, Sized]) -> Cost:
    """Return what a configuration's run needs with a pair of models."""
    with tempfile.TemporaryDirectory() as folder:
        run = counted_run(settings, pair, str(Path(folder) / "run"))
        weights, target = sum(model.n_bytes for model in pair), pair[1]
        n_shards = next(n for n in (1, *SHARDED_TO) if n * ASSUMPTIONS.memory * MEMORY_SHARE > weights)
        longest = LongestRow(*longest_rows(run)["target"]["generation_batch_size"])
        row = row_bytes(target.config, torch.bfloat16, longest)
        rows = min(MOST_ROWS, int(MEMORY_SHARE * (n_shards * ASSUMPTIONS.memory - weights) / row))
        rows = max(1, rows - rows % EVEN)
        length = longest.cached
        text = run.config.max_new_tokens * target.step_seconds(rows, length) / rows
        text += longest.read * target.token_seconds
        widths = [model.config.hidden_size for model in pair]
        cube = max(widths) ** 3
        algebra = 9 * cube / ASSUMPTIONS.algebra, 2 * cube / ASSUMPTIONS.products

        def minutes(n_workers: int) -> float:
            shared = (pair[0].token_seconds, target.token_seconds, text)
            rates = Rates(*(seconds / n_workers for seconds in shared), *algebra)
            return sum(seconds for _, seconds in run_steps(run, rates)) / 60

        return Cost(
            n_texts=run.config.n_cells * len(run.inputs.prompts) * run.config.n_seeds,
            weights=weights,
            n_shards=n_shards,
            rows=rows,
            batch=rows * row,
            sums=map_sums_bytes(run, *widths),
            minutes=minutes(1),
            # A pair that is shared by cards computes on one of them after the other.
            minutes_on_all=minutes(N_CARDS // n_shards),
        )


def main() -> None:
    """Print the assumptions and a table, both as Markdown."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    quiet_transformers()
    known, rows = shipped_models(), []
    for names, config in PAIRS.items():
        settings = parse_json(read_text(CONFIGS / f"{config}.json"), config)
        pair = tuple(known[name] for name in names)
        cost = cost_of(settings, pair)
        sizes = " → ".join(
            f"{name} ({of.n_parameters / 1e9:.2f}B)" for name, of in zip(names, pair, strict=True)
        )
        rows.append(
            [
                sizes,
                f"{cost.n_texts:,}",
                f"{cost.weights / 1e9:.0f} GB",
                str(cost.n_shards),
                str(cost.rows),
                f"{cost.batch / 1e9:.0f} GB",
                f"{cost.sums / 1e9:.0f} GB",
                f"{cost.minutes:.0f}",
                f"{cost.minutes_on_all:.0f}",
            ]
        )
    print(f"Computed, not measured. {ASSUMPTIONS}\n")
    header = "models, texts, weights, cards for both, rows, a batch, sums in main memory, minutes"
    print(markdown_table([*header.split(", "), f"minutes on {N_CARDS} cards"], rows))


if __name__ == "__main__":
    main()
