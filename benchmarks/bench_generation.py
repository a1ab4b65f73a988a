"""Compare steered generation, the sampler and perplexity with transformers, repeng and steering-vectors.

    python benchmarks/bench_generation.py [--quick] [--parts speed sampler ...] [--output results.json]

Prints one markdown table; every number in it is measured in this run, on this machine.

- speed: tokens a second of 128 rows on the default target at the default layer, for two sampling
  settings that are the same for all methods. Counted are the tokens that a text has, up to the token
  that ends it; `model.generate` goes on padding rows that have ended, which counts as time only.
- overhead: what one vector and many vectors cost, with ours.
- sampler: one step's choice for 128 rows from logits that a model gives while it writes.
- perplexity: of the written texts, in batches and one by one, by the target and another model.
- ties: how many texts change with the batch they are written in. Logits differ in their last bits
  between batch shapes, so a draw close to the border of two tokens can fall on either side.

Methods alternate, since other work on the machine changes every number; the shortest time counts.
What steering costs is smaller than these changes: it is the median over many short turns, whose runs
follow each other, of the time of a row and step, because a method whose texts end early has fewer
tokens for the same work.

`model.generate` in a batch is slow, so it writes fewer steps, and each of the rest counts as the mean of
those after the first; the notes say how many were timed. That favours it a little: steps grow longer as
the cache does.

Limits: the vectors are random directions at a fifth of the residual norm, so that texts stay ordinary;
the peers come from `benchmarks/requirements.txt`, and a row says when one is missing.
"""

import argparse
import contextlib
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_mapping import PEER_ERRORS, best_of, import_peer, machine, reason
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from activation_extractor import ActivationExtractor, block_output, measure_residual_norm
from decoding.loop import decode
from decoding.row_sampler import FIRST_SIZES, RowSampler
from evaluation import continuation_perplexities
from model_loading import decoder_blocks, load_model, pad_token_id, quiet_transformers
from reporting.tables import markdown_table
from steered_generation import SteeredGenerator
from support.artifacts import save_json
from support.tiny_models import tiny_model, tiny_tokenizer
from texts.personas import load_persona, load_prompts, shipped_personas

logger = logging.getLogger(__name__)

SEED = 0
PREFIX_WORDS = 7
STRENGTH = 0.2  # of the residual norm; the vectors of the rows go from this down to half of it
TOP_K = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
NUCLEUS = {"temperature": 1.0, "top_k": 0, "top_p": 0.9}
SETTINGS = {"temperature 1, top-k 50": TOP_K, "temperature 1, top-p 0.9": NUCLEUS}
SAMPLER_TURNS = 3
PARTS = ("speed", "overhead", "sampler", "perplexity", "ties")
Steer = Callable[["Work", Tensor], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    one_by_one: texts for `model.generate` without a batch; timed_steps: of `model.generate` in a
    batch, and turns: of ours, each for each of SETTINGS; slow_turns: of the other methods;
    overhead_tokens, overhead_turns: for comparing ours with one another;
    peer_vectors: of the vectors, those for which a peer is timed; alone: rows written one by one.
    """

    target: str = "gemma-3-270m"
    independent: str = "smollm2-135m-instruct"
    layer: int = 8
    band: tuple[int, ...] = tuple(range(4, 13))
    rows: int = 128
    new_tokens: int = 40
    vectors: int = 64
    one_by_one: int = 4
    timed_steps: tuple[int, int] = (6, 4)
    turns: tuple[int, int] = (2, 2)
    overhead_tokens: int = 8
    overhead_turns: int = 10
    peer_vectors: int = 2
    slow_turns: int = 2
    perplexity_turns: int = 1
    sampler_steps: int = 16
    plain_texts: int = 32
    alone: int = 24
    small_batch: int = 32
    batch_sizes: tuple[int, int] = (8, 32)


QUICK = Sizes(
    target="gemma3_text",
    independent="llama",
    layer=2,
    band=(1, 2),
    rows=8,
    new_tokens=6,
    vectors=4,
    timed_steps=(3, 3),
    overhead_tokens=3,
    overhead_turns=3,
    sampler_steps=8,
    plain_texts=4,
    alone=4,
    small_batch=4,
    batch_sizes=(2, 4),
)


@dataclass(frozen=True)
class Row:
    """One measurement. value is None where there is none, and note says why.

    against_one: speed over that of the same work one text at a time, without a batch.
    against_batch: speed over that of the same work by transformers in a batch.
    details: the numbers in note, for the JSON file.
    """

    part: str
    case: str
    method: str
    value: float | None
    unit: str
    against_one: float | None = None
    against_batch: float | None = None
    note: str = ""
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What one run of a method took and wrote.

    n_tokens: new tokens up to the one that ended each text; None where steps are missing.
    row_steps: rows that each step ran for, summed; only for ours.
    """

    seconds: float
    n_texts: int
    n_tokens: int | None = None
    row_steps: int = 0
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One way to write the rows; `turns` is how often it is timed. A peer may fail."""

    name: str
    write: Callable[[], Written]
    turns: int
    note: str
    is_peer: bool = False


@dataclass
class Work:
    """The rows that every method writes: as many prompts as vectors, each with several seeds.

    prompts: (rows,); a row's seed is its index. directions: (vectors, d) of norm 1, alphas: (vectors,)
    their strengths. Row i has vector i modulo the number of vectors; where there is one, it is the first.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sizes: Sizes
    prompts: list[str]
    directions: Tensor
    alphas: list[float]

    @property
    def block(self) -> nn.Module:
        return decoder_blocks(self.model)[self.sizes.layer]

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text, the same for all methods."""
        stated = self.model.generation_config.eos_token_id
        return sorted({*(stated if isinstance(stated, list) else [stated]), self.tokenizer.eos_token_id})

    @cached_property
    def together(self) -> Written:
        """All rows, each with its own vector, in one batch and with TOP_K; the speed part sets it."""
        logger.info("writing %d texts in one batch", self.sizes.rows)
        return write_ours(self, TOP_K, "rows", range(self.sizes.rows), self.sizes.rows)

    def row_steering(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return each row's own vector as `generate_batch` takes it."""
        chosen = [row % len(self.alphas) for row in rows]
        alphas = [self.alphas[index] for index in chosen]
        return {"steering_vectors": {self.sizes.layer: self.directions[chosen]}, "alphas": alphas}


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a packaged model, or the tiny one of an architecture for --quick."""
    if name in (QUICK.target, QUICK.independent):
        return tiny_model(name), tiny_tokenizer()
    return load_model(name, device="cpu", dtype="float32")


def distinct_prompts(n: int) -> list[str]:
    """Return n of the shipped prompts and, where those are too few, of the prefixes of persona texts."""
    texts = (text for name in shipped_personas() for text in load_persona(name).all_texts)
    prefixes = (" ".join(text.split()[:PREFIX_WORDS]) for text in texts)
    return list(dict.fromkeys([*load_prompts("test"), *load_prompts("development"), *prefixes]))[:n]


def make_work(sizes: Sizes) -> Work:
    """Load the target and give each row its prompt and its vector."""
    model, tokenizer = load(sizes.target)
    prompts = distinct_prompts(sizes.vectors)
    activations = ActivationExtractor(model, tokenizer, sizes.layer).extract_batch(prompts)
    norm = measure_residual_norm(activations).median
    generator = torch.Generator().manual_seed(SEED)
    directions = torch.randn(sizes.vectors, activations.shape[1], generator=generator)
    return Work(
        model=model,
        tokenizer=tokenizer,
        sizes=sizes,
        prompts=[prompts[row % len(prompts)] for row in range(sizes.rows)],
        directions=directions / directions.norm(dim=1, keepdim=True),
        alphas=(STRENGTH * norm * torch.linspace(1, 0.5, sizes.vectors)).tolist(),
    )


# Writing: ours and model.generate


@contextlib.contextmanager
def counted_rows(block: nn.Module) -> Iterator[list[int]]:
    """Yield a list to which each forward pass appends its number of rows."""
    counts: list[int] = []
    handle = block.register_forward_hook(
        lambda module, args, output: counts.append(len(block_output(output)))
    )
    try:
        yield counts
    finally:
        handle.remove()


def write_ours(
    work: Work, setting: dict[str, float], steering: str, rows: Sequence[int], batch_size: int
) -> Written:
    """Write rows with our generator.

    steering: `none`, `one` registered vector, `rows` of their own, or `band`: these at several blocks.
    """
    options = work.row_steering(rows) if steering in ("rows", "band") else {}
    if steering == "band":
        options = {
            "steering_vectors": dict.fromkeys(work.sizes.band, options["steering_vectors"][work.sizes.layer]),
            "alphas": [alpha / len(work.sizes.band) for alpha in options["alphas"]],
        }
    with (
        SteeredGenerator(work.model, work.tokenizer, batch_size=batch_size) as generator,
        counted_rows(work.block) as counts,
    ):
        if steering == "one":
            generator.register_steering(work.sizes.layer, work.directions[0], work.alphas[0])
        prompts, n_new = [work.prompts[row] for row in rows], work.sizes.new_tokens
        run = partial(generator.generate_batch, prompts, n_new, **setting, seeds=list(rows), **options)
        seconds, written = best_of(1, run)
    texts = tuple(generation.text for generation in written)
    return Written(seconds, len(rows), sum(each.n_tokens for each in written), sum(counts), texts)


class StepClock(StoppingCriteria):
    """Notes when each step of `generate` is done; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def write_with_generate(
    work: Work, setting: dict[str, float], rows: Sequence[int], timed_steps: int
) -> Written:
    """Write rows with one call of `model.generate`; steps that are not timed count as the mean one."""
    clock, pad_id = StepClock(), pad_token_id(work.tokenizer, work.model)
    start = time.perf_counter()
    prompts = [work.prompts[row] for row in rows]
    encoded = work.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rows[0])
        tokens = work.model.generate(
            input_ids=encoded.input_ids,
            attention_mask=encoded.attention_mask,
            do_sample=True,
            **setting,
            max_new_tokens=timed_steps,
            eos_token_id=work.ends,
            pad_token_id=pad_id,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    new = tokens[:, encoded.input_ids.shape[1] :]
    work.tokenizer.batch_decode(new, skip_special_tokens=True)
    seconds = time.perf_counter() - start
    n_missing = work.sizes.new_tokens - timed_steps
    if n_missing:
        seconds += n_missing * (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)
        return Written(seconds, len(rows))
    has_ended = torch.isin(new, torch.tensor(work.ends)).cummax(dim=1).values
    return Written(seconds, len(rows), int((~has_ended).sum()))


def write_groups(
    work: Work,
    setting: dict[str, float],
    steer: Steer,
    groups: Sequence[tuple[Sequence[int], int]],
    timed_steps: int,
) -> Written:
    """Write groups of rows, each with the index of its vector, one group after the other."""
    done = []
    for rows, index in groups:
        started = time.perf_counter()
        with steer(work, work.alphas[index] * work.directions[index]):
            prepared = time.perf_counter() - started
            written = write_with_generate(work, setting, rows, timed_steps)
        done.append((prepared + written.seconds, written.n_texts, written.n_tokens))
    seconds, n_texts, n_tokens = zip(*done, strict=True)
    return Written(sum(seconds), sum(n_texts), None if None in n_tokens else sum(n_tokens))


# Steering: a hook, repeng, steering-vectors


@contextlib.contextmanager
def by_hook(work: Work, added: Tensor) -> Iterator[None]:
    """Steer as most scripts do."""

    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if isinstance(output, tuple):
            return (output[0] + added, *output[1:])
        return output + added

    handle = work.block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def by_repeng(peer: ModuleType, work: Work, added: Tensor) -> Iterator[None]:
    """Steer with a ControlModel, which wraps the block itself."""
    directions = {work.sizes.layer: added.numpy()}
    control = peer.ControlVector(model_type=work.model.config.model_type, directions=directions)
    wrapped = peer.ControlModel(work.model, [work.sizes.layer])
    try:
        wrapped.set_control(control)
        yield
    finally:
        wrapped.unwrap()


@contextlib.contextmanager
def by_steering_vectors(peer: ModuleType, work: Work, added: Tensor) -> Iterator[None]:
    """Steer with a SteeringVector applied to the model."""
    with peer.SteeringVector({work.sizes.layer: added}).apply(work.model):
        yield


def found_peers(skip_peers: bool) -> tuple[dict[str, Steer], dict[str, str]]:
    """Return the peers' ways to steer, and peer -> why it is missing."""
    steers, missing = {}, {}
    if skip_peers:
        return steers, missing
    for name, module, steer in (
        ("repeng", "repeng", by_repeng),
        ("steering-vectors", "steering_vectors", by_steering_vectors),
    ):
        peer = import_peer(module)
        if isinstance(peer, str):
            missing[name] = peer
        else:
            steers[name] = partial(steer, peer)
    return steers, missing


@torch.inference_mode()
def steered_differences(work: Work, steers: dict[str, Steer]) -> dict[str, float | str]:
    """Return how far each way's logits of one prompt are from ours, over the effect of steering, or why not.

    The largest difference counts, over the largest that steering makes.
    """
    tokens = torch.tensor([work.tokenizer(work.prompts[0]).input_ids])
    plain = work.model(tokens).logits
    with SteeredGenerator(work.model, work.tokenizer) as generator:
        generator.register_steering(work.sizes.layer, work.directions[0], work.alphas[0])
        ours = work.model(tokens).logits
    effect = (ours - plain).abs().max()
    found: dict[str, float | str] = {}
    for name, steer in steers.items():
        try:
            with steer(work, work.alphas[0] * work.directions[0]):
                found[name] = ((work.model(tokens).logits - ours).abs().max() / effect).item()
        except PEER_ERRORS as error:
            found[name] = reason(error)
    return found


# Part 1: speed

OURS = {
    "none": "ours, unsteered",
    "one": "ours, one vector",
    "rows": "ours, {} vectors",
    "band": "ours, {} vectors at several blocks",
}
ALONE = "model.generate, one prompt at a time, hook"
BATCH = "model.generate, one batch, hook"


def our_methods(work: Work, setting: dict[str, float], turns: int) -> list[Method]:
    """Return our methods, which run right after one another in each turn."""
    rows = range(work.sizes.rows)
    return [
        Method(
            name.format(work.sizes.vectors),
            partial(write_ours, work, setting, steering, rows, len(rows)),
            turns,
            f"one batch of {len(rows)}",
        )
        for steering, name in OURS.items()
    ]


def other_methods(
    work: Work, setting: dict[str, float], timed_steps: int, peers: dict[str, Steer]
) -> list[Method]:
    """Return what transformers and the peers can do of the job."""
    sizes = work.sizes
    run = partial(write_groups, work, setting)
    whole = [(range(sizes.rows), 0)]
    timed = f"one batch of {sizes.rows}; {timed_steps} of {sizes.new_tokens} steps timed"
    singles = [((row,), 0) for row in range(sizes.one_by_one)]
    methods = [
        Method(
            ALONE,
            partial(run, by_hook, singles, sizes.new_tokens),
            sizes.slow_turns,
            f"{sizes.one_by_one} texts timed",
        ),
        Method(BATCH, partial(run, by_hook, whole, timed_steps), sizes.slow_turns, timed),
    ]
    groups = [(range(i, sizes.rows, sizes.vectors), i) for i in range(sizes.peer_vectors)]
    per_vector = f"a run for each vector, {sizes.peer_vectors} timed, with {len(groups[0][0])} texts each"
    for name, steer in peers.items():
        one = partial(run, steer, whole, timed_steps)
        methods.append(Method(f"{name}, one vector", one, sizes.slow_turns, timed, True))
    for name, steer in list(peers.items())[:1]:  # the other would run the same loop
        many = partial(run, steer, groups, sizes.new_tokens)
        methods.append(Method(f"{name}, {sizes.vectors} vectors", many, sizes.slow_turns, per_vector, True))
    return methods


def take_turns(case: str, ours: Sequence[Method], others: Sequence[Method]) -> dict[str, list[Written] | str]:
    """Return what each method wrote in each turn, or why a peer failed. Ours change direction in each."""
    found: dict[str, list[Written] | str] = {}
    for turn in range(max(method.turns for method in [*ours, *others])):
        for method in [*(ours[::-1] if turn % 2 else ours), *others]:
            if turn >= method.turns or isinstance(found.get(method.name), str):
                continue
            logger.info("speed, %s, %s, turn %d", case, method.name, turn + 1)
            try:
                found.setdefault(method.name, []).append(method.write())
            except PEER_ERRORS as error:
                if not method.is_peer:
                    raise
                found[method.name] = reason(error)
    return found


def overhead_row(case: str, name: str, base: str, found: dict[str, list[Written]]) -> Row:
    """Return how much longer a row's step takes with `name` than with `base`, in percent."""
    seconds, base_seconds = ([run.seconds / run.row_steps for run in found[key]] for key in (name, base))
    best = 100 * (min(seconds) / min(base_seconds) - 1)
    paired = [100 * (a / b - 1) for a, b in zip(seconds, base_seconds, strict=True)]
    median = statistics.median(paired)
    note = (
        f"time a row and step: {best:+.1f} % by best times, {median:+.1f} % by the median of {len(paired)} "
        f"turns ({min(paired):+.1f} to {max(paired):+.1f} %)"
    )
    details = {"best": best, "median": median, "lowest": min(paired), "highest": max(paired)}
    return Row("overhead", case, f"{name}, against {base}", median, "% time", note=note, details=details)


def overhead_rows(work: Work) -> list[Row]:
    """Compare our methods with one another in many short turns: they differ by less than the noise of one."""
    sizes = replace(work.sizes, new_tokens=work.sizes.overhead_tokens)
    ours = our_methods(replace(work, sizes=sizes), TOP_K, sizes.overhead_turns)
    case = f"{sizes.overhead_tokens} tokens"
    found = take_turns(case, ours, [])
    return [overhead_row(case, b.name, a.name, found) for a, b in pairwise(ours)]


def speed_rows(work: Work, skip_peers: bool) -> list[Row]:
    """Time every method with both sampling settings."""
    peers, missing = found_peers(skip_peers)
    differences = steered_differences(work, {"hook": by_hook, **peers})
    logger.info("steered logits differ from ours by (over the effect of steering): %s", differences)
    missing |= {name: found for name, found in differences.items() if isinstance(found, str)}
    peers = {name: steer for name, steer in peers.items() if name not in missing}
    logger.info("speed, warm-up")
    write_ours(work, TOP_K, "rows", range(work.sizes.rows), max(2, work.sizes.rows // 4))
    rows = []
    counts = zip(SETTINGS.items(), work.sizes.turns, work.sizes.timed_steps, strict=True)
    for (case, setting), turns, timed_steps in counts:
        ours = our_methods(work, setting, turns)
        others = other_methods(work, setting, timed_steps, peers)
        found = take_turns(case, ours, others)
        if setting is TOP_K:
            work.together = found[OURS["rows"].format(work.sizes.vectors)][0]
        one = found[ours[1].name]
        mean_length = statistics.fmean(run.n_tokens / run.n_texts for run in one)
        speeds = {
            name: max((run.n_tokens or mean_length * run.n_texts) / run.seconds for run in runs)
            for name, runs in found.items()
            if not isinstance(runs, str)
        }
        for method in [*ours, *others]:
            runs, speed = found[method.name], speeds.get(method.name)
            if speed is None:
                rows.append(Row("speed", case, method.name, None, "tokens/s", note=runs))
                continue
            note, details = describe_runs(method, runs, mean_length)
            peer = method.name.partition(",")[0] if method.is_peer else "hook"
            if method not in ours:
                details["difference_from_ours"] = differences[peer]
                note += (
                    f"; steered logits differ from ours by {differences[peer]:.0e} of the effect"
                    if differences[peer]
                    else "; the same steered logits as ours"
                )
            against = (None if method.name == base else speed / speeds[base] for base in (ALONE, BATCH))
            rows.append(Row("speed", case, method.name, speed, "tokens/s", *against, note, details))
    return rows + [Row("speed", "", name, None, "tokens/s", note=why) for name, why in missing.items()]


def describe_runs(
    method: Method, runs: Sequence[Written], mean_length: float
) -> tuple[str, dict[str, float]]:
    """Return the note and its numbers: how much was timed, and how long the texts are."""
    lengths = [run.n_tokens / run.n_texts for run in runs if run.n_tokens is not None]
    note = f"{method.note}; best of {len(runs)}"
    note += (
        f"; {statistics.fmean(lengths):.1f} tokens a text"
        if lengths
        else f"; as many tokens a text as ours with one vector ({mean_length:.1f})"
    )
    details = {"tokens_per_text": statistics.fmean(lengths) if lengths else mean_length}
    details["seconds"] = min(run.seconds for run in runs)
    if runs[0].texts:
        n_different = sum(len(set(texts)) > 1 for texts in zip(*(run.texts for run in runs), strict=True))
        details["texts_that_differ_between_turns"] = n_different
        note += f"; {n_different} texts differ between turns"
    return note, details


# Part 2: sampler


def recorded_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], n_steps: int
) -> list[Tensor]:
    """Return the logits (rows, vocabulary) of every fourth step while a nucleus is sampled."""
    sampler, kept = RowSampler(**NUCLEUS), []
    uniform = torch.rand(len(prompts), n_steps, generator=torch.Generator().manual_seed(SEED))

    def choose(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        if step % 4 == 3:
            kept.append(logits.clone())  # keeps the layout
        return sampler.choose(logits, uniform[rows, step])

    tokens = [tokenizer(prompt).input_ids for prompt in prompts]
    decode(model, tokens, choose, n_steps, pad_id=pad_token_id(tokenizer, model))
    return kept


def nucleus_sizes(logits: Tensor, top_p: float) -> Tensor:
    """Return how many tokens each row's nucleus has, (rows,)."""
    sizes = []
    for part in logits.split(16):  # a sorted copy of all rows takes gigabytes
        p = part.sort(descending=True).values.double().softmax(-1)
        sizes.append((p.cumsum(-1) - p < top_p).sum(-1))
    return torch.cat(sizes)


def library_chooser(setting: dict[str, float]) -> Callable[[Tensor], Tensor]:
    """Return the choice that `model.generate` makes with a setting of temperature 1.

    It leaves the temperature out when that is 1, and the copy that it makes of the logits is not timed.
    """
    generator = torch.Generator().manual_seed(SEED)
    warper = TopKLogitsWarper(setting["top_k"]) if setting["top_k"] else TopPLogitsWarper(setting["top_p"])

    @torch.inference_mode()
    def choose(logits: Tensor) -> Tensor:
        probabilities = warper(None, logits).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return choose


def sampler_rows(sizes: Sizes) -> list[Row]:
    """Time one step's choice with a large and a small vocabulary."""
    rows = []
    prompts = load_prompts("test")
    repeated = [prompts[row % len(prompts)] for row in range(sizes.rows)]
    for name in (sizes.independent, sizes.target):
        logger.info("sampler, logits of %s", name)
        model, tokenizer = load(name)
        recorded = recorded_logits(model, tokenizer, repeated, sizes.sampler_steps)
        del model
        nuclei = torch.cat([nucleus_sizes(logits, NUCLEUS["top_p"]) for logits in recorded])
        for setting_name, setting in SETTINGS.items():
            case = f"vocabulary of {recorded[-1].shape[1]:,}, {len(recorded[-1])} rows, {setting_name}"
            logger.info("sampler, %s", case)
            rows += time_choosers(case, setting, recorded[-1], nuclei, SAMPLER_TURNS)
    return rows


def time_choosers(
    case: str, setting: dict[str, float], columns: Tensor, nuclei: Tensor, turns: int
) -> list[Row]:
    """Time ours on both layouts and the processors of transformers, in turns."""
    contiguous, sampler = columns.contiguous(), RowSampler(**setting)
    uniform = torch.rand(len(columns), generator=torch.Generator().manual_seed(SEED))
    choosers = {
        "ours, contiguous columns": lambda: sampler.choose(columns, uniform),
        "ours, contiguous rows": lambda: sampler.choose(contiguous, uniform),
        "processors of transformers": partial(library_chooser(setting), contiguous),
    }
    seconds, chosen = dict.fromkeys(choosers, math.inf), {}
    for _ in range(turns):
        for name, choose in choosers.items():
            taken, chosen[name] = best_of(1, choose)
            seconds[name] = min(seconds[name], taken)
    ours, ours_rows, library = choosers
    n_same = int((chosen[ours] == chosen[ours_rows]).sum())
    notes = {
        ours: "as our head makes them",
        ours_rows: f"same token as from columns in {n_same} of {len(columns)} rows",
        library: f"on contiguous rows, with softmax and multinomial; best of {turns} each",
    }
    details = {}
    if not setting["top_k"]:
        details = {f"nucleus_past_{n}": (nuclei >= n).double().mean().item() for n in FIRST_SIZES}
        details |= {"median_nucleus": nuclei.median().item(), "largest_nucleus": nuclei.max().item()}
        past = ", ".join(f"past the first {n:,} in {details[f'nucleus_past_{n}']:.1%}" for n in FIRST_SIZES)
        notes[ours] += (
            f"; nucleus {past} of {len(nuclei):,} choices (median {details['median_nucleus']:,}, "
            f"largest {details['largest_nucleus']:,})"
        )
    return [
        Row(
            "sampler",
            case,
            name,
            1000 * taken,
            "ms",
            against_batch=None if name == library else seconds[library] / taken,
            note=notes[name],
            details=details if name == ours else {},
        )
        for name, taken in seconds.items()
    ]


# Part 3: perplexity


@torch.inference_mode()
def plain_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str
) -> float:
    """Return the perplexity of a continuation as most scripts compute it: one text, all logits."""
    n_before = len(tokenizer(prompt).input_ids)
    tokens = tokenizer(prompt + text, return_tensors="pt").input_ids
    logits = model(tokens, use_cache=False).logits[0, n_before - 1 : -1].float()
    return math.exp(nn.functional.cross_entropy(logits, tokens[0, n_before:]).item())


def has_clean_seam(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> bool:
    """Tell whether the prompt's tokens begin the whole's and others follow, as plain_perplexity assumes."""
    before, whole = tokenizer(prompt).input_ids, tokenizer(prompt + text).input_ids
    return len(whole) > len(before) and whole[: len(before)] == before


def perplexity_rows(work: Work) -> list[Row]:
    """Score the written texts in batches and one by one, with the target and the independent model."""
    pairs = list(dict.fromkeys(zip(work.prompts, work.together.texts, strict=True)))
    rows = []
    independent = load(work.sizes.independent)
    for name, (model, tokenizer) in (
        (work.sizes.target, (work.model, work.tokenizer)),
        (work.sizes.independent, independent),
    ):
        clean = [pair for pair in pairs if has_clean_seam(tokenizer, *pair)]
        rows += score_with(model, tokenizer, f"{len(clean)} texts, {name}", clean, work.sizes)
    return rows


def score_with(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    case: str,
    pairs: list[tuple[str, str]],
    sizes: Sizes,
) -> list[Row]:
    """Time every way to score the pairs, in turns, and compare the values."""
    prompts, texts = ([pair[side] for pair in pairs] for side in (0, 1))
    plain = "one by one, all logits, cross_entropy"
    # Evenly from all texts: those of one prompt are similar.
    few = pairs[:: max(1, len(pairs) // sizes.plain_texts)][: sizes.plain_texts]
    score = partial(continuation_perplexities, model, tokenizer)
    ways = {
        plain: (len(few), lambda: [plain_perplexity(model, tokenizer, *pair) for pair in few]),
        **{
            f"ours, batches of {n}": (len(pairs), partial(score, prompts, texts, n))
            for n in sizes.batch_sizes
        },
    }
    score(prompts[: sizes.batch_sizes[0]], texts[: sizes.batch_sizes[0]])
    seconds, values = dict.fromkeys(ways, math.inf), {}
    for turn in range(sizes.perplexity_turns):
        for name, (_, run) in ways.items():
            logger.info("perplexity, %s, %s, turn %d", case, name, turn + 1)
            taken, values[name] = best_of(1, run)
            seconds[name] = min(seconds[name], taken)
    base = len(few) / seconds[plain]
    expected = torch.tensor(values[plain], dtype=torch.float64)
    note = f"{len(few)} texts timed; best of {sizes.perplexity_turns}"
    rows = [Row("perplexity", case, plain, base, "texts/s", note=note)]
    for name, (n, _) in list(ways.items())[1:]:
        by_pair = dict(zip(pairs, values[name], strict=True))
        got = torch.tensor([by_pair[pair] for pair in few], dtype=torch.float64)
        difference = ((got - expected).abs() / expected).max().item()
        note = f"best of {sizes.perplexity_turns}; differs by up to {difference:.0e} (relative)"
        details = {"relative_difference": difference, "median_perplexity": statistics.median(values[name])}
        speed = n / seconds[name]
        rows.append(Row("perplexity", case, name, speed, "texts/s", speed / base, note=note, details=details))
    return rows


# Part 4: near ties


def ties_rows(work: Work) -> list[Row]:
    """Write the same rows in other batches and count the texts that differ from those of one batch."""
    n = work.sizes.rows
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED)).tolist()
    few = list(range(0, n, max(1, n // work.sizes.alone)))[: work.sizes.alone]
    small = work.sizes.small_batch
    ways = (
        ("alone", few, 1),
        (f"batches of {small}", range(n), small),
        (f"one batch of {n}, other order", order, n),
    )
    rows = []
    for name, chosen, batch_size in ways:
        logger.info("ties, %s", name)
        written = write_ours(work, TOP_K, "rows", chosen, batch_size)
        n_different = sum(
            text != work.together.texts[row] for row, text in zip(chosen, written.texts, strict=True)
        )
        rate = f"one in {written.n_tokens / n_different:,.0f}" if n_different else "none"
        note = f"of {len(chosen)}; {rate} of {written.n_tokens:,} tokens; {written.seconds:.0f} s"
        details = {"texts": len(chosen), "tokens": written.n_tokens, "seconds": written.seconds}
        method = f"{name}, against one batch of {n}"
        case = f"{next(iter(SETTINGS))}, {work.sizes.vectors} vectors"
        rows.append(Row("ties", case, method, n_different, "texts differ", note=note, details=details))
    return rows


# Output


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    ratio_columns = ("Against one at a time", "Against transformers in a batch")
    header = ("Part", "Case", "Method", "Measured", *ratio_columns, "Notes")
    lines = []
    for row in rows:
        digits = 0 if row.unit == "texts differ" else 1
        measured = "–" if row.value is None else f"{row.value:,.{digits}f} {row.unit}"
        ratios = [
            "" if ratio is None else f"{ratio:,.3g}× the speed"
            for ratio in (row.against_one, row.against_batch)
        ]
        lines.append((row.part, row.case, row.method, measured, *ratios, row.note))
    return markdown_table(header, lines, left=("Part", "Case", "Method", "Notes"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--skip-peers", action="store_true", help="leave repeng and steering-vectors out")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file too")
    return parser.parse_args()


def measure(sizes: Sizes, parts: Sequence[str], skip_peers: bool) -> list[Row]:
    """Return the rows of the chosen parts."""
    rows = sampler_rows(sizes) if "sampler" in parts else []
    if set(parts) - {"sampler"}:
        work = make_work(sizes)
        rows += speed_rows(work, skip_peers) if "speed" in parts else []
        rows += overhead_rows(work) if "overhead" in parts else []
        rows += perplexity_rows(work) if "perplexity" in parts else []
        rows += ties_rows(work) if "ties" in parts else []
    return sorted(rows, key=lambda row: PARTS.index(row.part))


def main() -> None:
    """Measure the chosen parts, print the table and write the file."""
    arguments = parse_arguments()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    quiet_transformers()
    found_machine = machine()
    logger.info("%s", found_machine)
    rows = measure(QUICK if arguments.quick else Sizes(), arguments.parts, arguments.skip_peers)
    print(markdown(rows))
    if arguments.output:
        save_json(arguments.output, {"machine": found_machine, "rows": [asdict(row) for row in rows]})
        logger.info("wrote %s", arguments.output)


if __name__ == "__main__":
    main()
