"""Measure a GPU with models of real sizes: what it computes first, then what limits its speed.

    python benchmarks/bench_gpu.py --output gpu.jsonl
    python benchmarks/bench_gpu.py --tiny --device cpu --output rehearsal.jsonl

Nothing is downloaded: models are made on the device from configurations of real sizes, with random weights,
whose logits are spread like a trained model's. Each result is a line of the output file as soon as it is
there, and so is a part that fails or for which no time is left: a run that is ended leaves what it had.

- ceilings: bytes and products a second, against which the rest is held.
- texts, scores: in float32 the device writes the texts of the CPU, with and without CUDA graphs, and its
  activations, maps and perplexities are the CPU's. What differs is counted.
- steps: milliseconds of a decoding step by rows, as usual and as a graph, beside the floor (the bytes of
  weights and cache, or the products, whichever take longer) and beside `model.generate` without vectors.
- algebra, sums: a map's decompositions and sums in float64, on the device and on the host.
- memory: batches are halved when the device's memory runs out.

Limits: random weights write no words, so rows never end; kernels are warm after the first of each size.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from bench_mapping import machine, reason, relative_difference
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import steered_generation
from activation_extractor import ActivationExtractor, paired_activations
from model_loading import d_model, n_layers, pad_token_id, pad_tokens, quiet_transformers
from ridge_mapping import RidgeMapping
from steered_generation import Generation, SteeredGenerator
from support.pair_statistics import PairStatistics
from support.tiny_models import D_MODEL, tiny_model, tiny_tokenizer

LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "mixtral")
SAMPLING = {"top-k": {}, "top-p": {"top_k": 0, "top_p": 0.9}, "greedy": {"temperature": 0}}
N_TOKENS = (8, 40)  # new ones, from whose times that of a step follows
SPREAD = 3  # of logits
BAND = 9  # blocks that are steered


class Bench:
    """A device, the time that is left, and the file of results."""

    def __init__(self, output: Path, seconds: float, device: str, tiny: bool) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output, self.device, self.tiny = output, torch.device(device), tiny
        self.on_cuda = self.device.type == "cuda"
        self.started, self.seconds = time.perf_counter(), seconds
        self.architectures = ARCHITECTURES[:1] if tiny else ARCHITECTURES
        self.n_tokens = (2, 6) if tiny else N_TOKENS
        self.rates: dict[str, float] = {}

    def has(self, seconds: float) -> bool:
        """Tell whether so much time is left."""
        return self.tiny or time.perf_counter() - self.started + seconds < self.seconds

    def note(self, part: str, **values: Any) -> None:
        """Write a result as a line of the file, and print it."""
        row = {"part": part, "at": round(time.perf_counter() - self.started, 1), **values}
        with self.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = (f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in values.items())
        print(f"[{row['at']:6.1f}] {part}: {', '.join(shown)}", flush=True)

    def run(self, part: Callable[["Bench"], None], needs: float) -> None:
        """Run a part if it has the seconds it needs; its error is noted, and the next part follows."""
        if not self.has(needs):
            self.note(part.__name__, skipped=f"needs {needs:g} s")
            return
        try:
            part(self)
        except Exception as error:
            self.note(part.__name__, error=reason(error))
        if self.on_cuda:
            torch.cuda.empty_cache()

    def seconds_of(self, work: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
        """Return the median seconds of `work`, after as many calls as `warm` says."""
        spent = []
        for _ in range(warm + repeats):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            spent.append(time.perf_counter() - started)
        return statistics.median(spent[warm:])

    def wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()


def ceilings(bench: Bench) -> None:
    """Note the rates of copies and of square products, which later parts are held against."""
    source = torch.ones(2**10 if bench.tiny else 2**30, dtype=torch.bfloat16, device=bench.device)
    target = torch.empty_like(source)
    bench.rates["bytes"] = 4 * len(source) / bench.seconds_of(lambda: target.copy_(source), 5)
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096), (torch.float64, 4096)):
        size = 64 if bench.tiny else size
        left, right = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        seconds = bench.seconds_of(lambda a=left, b=right: a @ b)
        bench.rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    bench.note("ceilings", **bench.rates)


# The same as on the CPU


def texts(bench: Bench) -> None:
    """Count the texts that differ from the CPU's, as usual and with graphs."""
    prompts = ["Once upon", "The sea", "Once upon", "A rather longer prompt than the others"] * 4
    vectors = torch.arange(16 * D_MODEL).view(16, D_MODEL).float().cos()
    steering = {"steering_vectors": {1: vectors, 2: -vectors}, "alphas": [0.5, 0.0, 0.5, 1.0] * 4}

    def write(model: PreTrainedModel, cuda_graphs: bool = False) -> list[Generation]:
        with SteeredGenerator(model, tiny_tokenizer(), batch_size=7, cuda_graphs=cuda_graphs) as generator:
            return [
                generation
                for options in SAMPLING.values()
                for generation in generator.generate_batch(
                    prompts, sum(bench.n_tokens) // 2, seeds=range(16), **steering, **options
                )
            ]

    for name in bench.architectures:
        expected, model = write(tiny_model(name)), tiny_model(name).to(bench.device)
        for cuda_graphs in (False, True) if bench.on_cuda else (False,):
            found = write(model, cuda_graphs)
            different = sum(a != b for a, b in zip(found, expected, strict=True))
            bench.note("texts", model=name, cuda_graphs=cuda_graphs, n=len(expected), different=different)


def scores(bench: Bench) -> None:
    """Note how far activations, a map and perplexities are from the CPU's, relative to the largest row."""
    from evaluation import continuation_perplexities  # which needs a judge's client

    tokenizer, read = tiny_tokenizer(), [f"Text {n} of {n * n}." for n in range(40)]

    def numbers(model: PreTrainedModel) -> dict[str, Tensor]:
        sides = [ActivationExtractor(model, tokenizer, layer) for layer in (1, 2)]
        (batch,) = paired_activations(*sides, read)
        mapping = RidgeMapping(D_MODEL, D_MODEL)
        mapping.cross_validate(batch.H_source[1], batch.H_target[2], [0.1, 1.0], 3, batch.text_idx)
        perplexities = continuation_perplexities(model, tokenizer, read[:4], read[4:8], 2)
        return {
            "activations": sides[0].extract_batch(read[:4], "mean"),
            "map": mapping.W,
            "perplexities": torch.tensor(perplexities)[:, None],
        }

    for name in bench.architectures:
        expected, found = numbers(tiny_model(name)), numbers(tiny_model(name).to(bench.device))
        differences = {key: relative_difference(found[key], expected[key]) for key in expected}
        bench.note("scores", model=name, **differences)


# Decoding


def make_model(bench: Bench, sizes: dict[str, Any]) -> PreTrainedModel:
    """Return a bfloat16 model of these sizes with random weights, made on the device."""
    sizes = {**sizes, **(SMALL if bench.tiny else {})}
    config = AutoConfig.for_model(**sizes, bos_token_id=256, eos_token_id=257, pad_token_id=258)
    with bench.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, SPREAD * config.hidden_size**-0.5)
    return model.eval()


def make_prompts(n: int) -> list[str]:
    """Return n prompts, all different, of 36 to 44 characters, each of which is a token."""
    words = "what would you say to somebody who asked about the sea and the hills and the rain today " * 2
    return [f"{number} {words[number % 40 :]}"[: 44 - number % 9] for number in range(n)]


def steps(sizes: dict[str, Any], rows: Sequence[int]) -> Callable[[Bench], None]:
    """Return the part that times decoding steps of a model for so many rows."""

    def part(bench: Bench) -> None:
        model, tokenizer = make_model(bench, sizes), tiny_tokenizer()
        tokenizer.model_max_length = 2048
        with mock.patch.object(steered_generation, "end_tokens", return_value=set()):
            for n in (4,) if bench.tiny else rows:
                time_steps(bench, model, tokenizer, n)

    part.__name__ = f"steps of {sizes['model_type']}"
    return part


def time_steps(bench: Bench, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Note a step's time for so many rows: as usual, as a graph, and of transformers."""
    prompts, depth = make_prompts(rows), n_layers(model)
    band = range(depth // 4, min(depth // 4 + BAND, depth))
    vectors = (
        torch.randn(rows, d_model(model), generator=torch.Generator().manual_seed(0)) / d_model(model) ** 0.5
    )
    steering = {"steering_vectors": dict.fromkeys(band, vectors), "alphas": [0.5] * rows}
    seen: dict[bool, list[Generation]] = {}
    known = {
        "model": model.config.model_type,
        "rows": rows,
        "floor_ms": 1e3 * floor_seconds(bench, model, rows),
    }

    def note(how: str, write: Callable[[int], Any], **more: Any) -> None:
        write(4)
        few, many = bench.n_tokens
        short, long = (bench.seconds_of(lambda n=n: write(n), 1, 0) for n in (few, many))
        step = (long - short) / (many - few)
        rest = {"ms_before": 1e3 * (short - few * step), "tokens_a_second": rows / step, **more}
        if bench.on_cuda:
            rest["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        bench.note("steps", how=how, **known, ms=1e3 * step, **rest)

    for cuda_graphs in (False, True) if bench.on_cuda else (False,):
        if not bench.has(20):
            return
        with SteeredGenerator(model, tokenizer, batch_size=rows, cuda_graphs=cuda_graphs) as generator:

            def write(n: int, generator: SteeredGenerator = generator, key: bool = cuda_graphs) -> None:
                seen[key] = generator.generate_batch(prompts, n, seeds=range(rows), **steering)

            note("graph" if cuda_graphs else "usual", write)
    if len(seen) == 2:
        equal = sum(a == b for a, b in zip(seen[False], seen[True], strict=True))
        bench.note("graph against usual, bfloat16", **known, equal_texts=equal)
    tokens = tokenizer(prompts).input_ids
    padded, mask = pad_tokens(tokens, pad_token_id(tokenizer, model), "left", bench.device)
    given = {
        "input_ids": padded,
        "attention_mask": mask,
        "do_sample": True,
        "top_k": 50,
        "eos_token_id": None,
    }
    if bench.has(20):
        note("model.generate", lambda n: model.generate(**given, max_new_tokens=n, pad_token_id=258))


def floor_seconds(bench: Bench, model: PreTrainedModel, rows: int) -> float:
    """Return the least seconds of a step: to read weights and cache once, or to multiply."""
    config, n_positions = model.config, 44 + sum(N_TOKENS) // 2
    n_weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    cache = rows * n_positions * n_layers(model) * 2 * width
    return max(2 * (n_weights + cache) / bench.rates["bytes"], 2 * n_weights * rows / bench.rates["bfloat16"])


# Maps and memory


def algebra(bench: Bench) -> None:
    """Note what decompositions of a map take in float64, on the device and on the host."""
    for size in (64,) if bench.tiny else (2048, 4096):
        root = torch.randn(2 * size, size, dtype=torch.float64)
        for place in dict.fromkeys((bench.device.type, "cpu")):
            if not bench.has(60 * (size / 4096) ** 3 + 10):
                return
            gram = root.to(place).T @ root.to(place)
            works = {
                "eigh": lambda gram=gram: torch.linalg.eigh(gram),
                "solve": lambda gram=gram: torch.linalg.solve(gram, gram),
                "svd": lambda gram=gram: torch.linalg.svd(gram, full_matrices=False),
            }
            for name, work in works.items():
                bench.note("algebra", what=name, size=size, place=place, seconds=bench.seconds_of(work, 1))


def sums(bench: Bench) -> None:
    """Note what the sums over 4,096 pairs take: ours on the host, and the products alone on the device."""
    size, n = (32, 256) if bench.tiny else (3840, 4096)
    sides = [torch.randn(n, size) for _ in range(2)]
    pairs = torch.cat(sides, dim=1).to(bench.device)
    bench.note(
        "sums",
        pairs=n,
        width=2 * size,
        host_ms=1e3 * bench.seconds_of(lambda: PairStatistics(size, size).add(*sides), 2),
        device_float64_ms=1e3 * bench.seconds_of(lambda: pairs.double().T @ pairs.double()),
        device_float32_ms=1e3 * bench.seconds_of(lambda: pairs.T @ pairs),
    )


def memory(bench: Bench) -> None:
    """Note the batch size after memory ran out; on a GPU of which little is left to this process."""
    if not bench.on_cuda or bench.tiny:
        return
    model, tokenizer = make_model(bench, {**LLAMA2_7B, "num_hidden_layers": 2}), tiny_tokenizer()
    whole, rows = torch.cuda.get_device_properties(bench.device).total_memory, 2048
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2e9) / whole)
    try:
        with SteeredGenerator(model, tokenizer, batch_size=rows) as generator:
            n = len(generator.generate_batch(make_prompts(rows), 24))
            bench.note("memory", rows=n, batch_size_before=rows, batch_size_after=generator.batch_size)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all parts in the order of what would be missed most."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("bench_gpu.jsonl"), help="append results here")
    parser.add_argument("--seconds", type=float, default=500, help="begin no part that would end later")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    given = parser.parse_args(arguments)
    quiet_transformers()
    bench = Bench(given.output, given.seconds, given.device, given.tiny)
    name = torch.cuda.get_device_name() if bench.on_cuda else "cpu"
    bench.note("machine", device=name, transformers=transformers.__version__, **machine())
    bench.run(ceilings, 10)
    bench.run(texts, 40)
    bench.run(scores, 20)
    bench.run(steps(LLAMA2_7B, (32, 120, 480)), 60)
    bench.run(algebra, 30)
    bench.run(sums, 15)
    bench.run(steps(QWEN25_7B, (120, 480)), 50)
    bench.run(memory, 15)


if __name__ == "__main__":
    main()
