"""Compare the map's cross-validation, its memory and the reading of activations with other libraries.

    python benchmarks/bench_mapping.py [--quick] [--output results.json]
    python benchmarks/bench_mapping.py --band 576 1024 [--band-pairs 9]

Prints one markdown table; every number in it is measured in this run, on this machine.

- Cross-validation: 5 folds x 25 lambdas on synthetic pairs, against one scikit-learn fit for each
  fold and lambda, and against himalaya, which shares one decomposition over a fold's lambdas.
- Memory: the peak of a process of its own for each number of pairs.
- Band (with `--band`, and nothing else then): CPU seconds of the sums and maps of a band of layer pairs with
  the lexical controls, and the peak, of a process of its own for each width.
- Extraction: last-token activations of one mid-depth block of a real model, against a plain loop,
  steering-vectors and repeng. The share of peak counts the products of real tokens with the weights of the
  linear layers that ran, and not padding or attention. A method that runs further blocks gets credit for
  them in this share, but not in its speed.

Limits: other work on the machine changes every number, and most of all cross-validation, because waiting
threads slow down small decompositions several times. Extraction methods are timed in rotation, so their
ratios suffer less. The load at the start is logged and written. Peers come from
`benchmarks/requirements.txt`; a row says when one is missing.
"""

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

from experiment.conditions import vector_names
from maps.comparison_maps import ComparisonMap
from reporting.tables import markdown_table
from ridge_mapping import RidgeMapping, assign_folds
from support.artifacts import save_json
from support.pair_statistics import DEFAULT_SAMPLE, PairStatistics

logger = logging.getLogger(__name__)

D_SOURCE, D_TARGET = 576, 640
N_FOLDS, SEED = 5, 0
LAMBDAS = np.logspace(-6, 6, 25).tolist()
N_FITS = N_FOLDS * len(LAMBDAS)
BLOCK = 4096
REPEATS = 2
BAND_ROWS, N_LEXICAL = 10_000, 2
FULL_HIMALAYA = 10_000  # pairs up to which it runs in full: it holds (held-out x training) matrices
SOURCE_MODEL, LAYER = "smollm2-135m-instruct", 15
INSTALL = "not installed: `pip install --no-deps -r benchmarks/requirements.txt`"
PEER_ERRORS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Row:
    """Hold one measurement, or None as value and the reason as note.

    ratio: value over that of our first row of the part (cross-validation: of the same case), None
    for that row itself. details: the numbers in note, for the JSON file.
    """

    part: str
    case: str
    method: str
    value: float | None
    unit: str
    ratio: float | None = None
    note: str = ""
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reader:
    """Hold one way to read activations: texts -> (n, d), at last tokens unless `last` is False."""

    name: str
    read: Callable[[list[str]], Tensor]
    note: str = ""
    last: bool = True


def best_of(repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the shortest time in seconds of several calls, and what the last one returned."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def import_peer(name: str) -> ModuleType | str:
    """Return a peer's module, or the reason why there is none."""
    np.float_ = np.float64  # a name dropped in numpy 2, which repeng 0.4.0 has in annotations
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return INSTALL if error.name == name.partition(".")[0] else f"cannot be imported: {reason(error)}"
    except PEER_ERRORS as error:
        return f"cannot be imported: {reason(error)}"


def reason(error: Exception) -> str:
    """Return the kind and first line of an error, short enough for a table."""
    first = (str(error).strip() or "no message").splitlines()[0][:120]
    return f"{type(error).__name__}: {first}".replace("|", "/")


# Part 1: cross-validation


def synthetic_pairs(n: int) -> tuple[Tensor, Tensor]:
    """Return sources (n, 576) and targets (n, 640), float32: a linear map plus noise.

    The sources are correlated, with variances 1/k along their principal axes and a mean that is
    not 0; one dimension is a hundred times as large as the others.
    """
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    axes = torch.linalg.qr(normal(D_SOURCE, D_SOURCE)).Q
    scale = torch.arange(1, D_SOURCE + 1).rsqrt()
    sources = (normal(n, D_SOURCE) * scale) @ axes.T + 0.5 * normal(D_SOURCE)
    weights = normal(D_SOURCE, D_TARGET) / D_SOURCE**0.5
    targets = sources @ weights + 0.08 * normal(n, D_TARGET)
    sources[:, 7] *= 100
    return sources, targets


def run_ours(sources: Tensor, targets: Tensor, n_sample: int) -> float:
    """Sum up the pairs block by block and cross-validate; returns the best lambda.

    n_sample: pairs kept for the shuffled control and the retrieval accuracy; with 0 there are neither.
    """
    statistics = PairStatistics(D_SOURCE, D_TARGET, N_FOLDS, n_sample=n_sample)
    for start in range(0, len(sources), BLOCK):
        rows = slice(start, start + BLOCK)
        statistics.add(sources[rows], targets[rows])
    mapping = RidgeMapping.from_statistics(statistics, "relative")
    return mapping.cross_validate(lambda_values=LAMBDAS)[0]


def refit_folds(
    sources: np.ndarray, targets: np.ndarray, folds: np.ndarray, lambda_: float
) -> tuple[float, float]:
    """Fit scikit-learn's ridge once for each fold at one lambda.

    Returns the seconds in fits, predictions and squared errors (not in taking the rows out; the
    better of two), and the mean squared error over all held-out pairs.
    """
    from sklearn.linear_model import Ridge  # the memory part must not load what it doesn't need

    seconds, squares = 0.0, 0.0
    for fold in range(N_FOLDS):
        held_out = folds == fold
        train_x, train_y, test_x, test_y = (
            values[chosen] for chosen in (~held_out, held_out) for values in (sources, targets)
        )
        mean_diagonal = train_x.var(0, dtype=np.float64).mean() * len(train_x)
        model = Ridge(alpha=lambda_ * mean_diagonal, solver="cholesky", fit_intercept=True)

        def held_out_squares(m=model, x=train_x, y=train_y, tx=test_x, ty=test_y) -> float:
            return np.square(m.fit(x, y).predict(tx) - ty).sum(dtype=np.float64)

        taken, found = best_of(REPEATS, held_out_squares)
        seconds, squares = seconds + taken, squares + found
    return seconds, float(squares) / targets.size


def sklearn_rows(sources: Tensor, targets: Tensor, lambda_: float, case: str, ours: float) -> list[Row]:
    """Time one fit for each fold in float64 and float32, scale up, and compare the held-out errors."""
    folds = assign_folds(len(sources), N_FOLDS, None, SEED).numpy()
    mapping = RidgeMapping(D_SOURCE, D_TARGET, "relative")
    expected = mapping.cross_validate(sources, targets, [lambda_], N_FOLDS, None, SEED)[1][lambda_]
    rows = []
    for dtype in (np.float64, np.float32):
        x, y = (values.numpy().astype(dtype) for values in (sources, targets))
        seconds, error = refit_folds(x, y, folds, lambda_)
        difference = abs(error - expected) / expected
        name = f"scikit-learn Ridge (cholesky), {np.dtype(dtype).name}"
        note = (
            f"{N_FOLDS} timed (best of {REPEATS}), scaled to {N_FITS}; held-out error differs from ours "
            f"by {difference:.1e} (relative) at lambda {lambda_:.2g}"
        )
        total = seconds * N_FITS / N_FOLDS
        details = {"relative_error_difference": difference, "lambda": lambda_}
        rows.append(Row("cross-validation", case, name, total, "s", total / ours, note, details))
    return rows


def himalaya_row(sources: Tensor, targets: Tensor, case: str, ours: float) -> Row:
    """Time himalaya's primal ridge cross-validation, in full or scaled from one fold."""
    peer, n = import_peer("himalaya.ridge"), len(sources)

    def row(seconds: float | None, note: str) -> Row:
        name, ratio = (
            "himalaya RidgeCV (svd, numpy backend), float32",
            None if seconds is None else seconds / ours,
        )
        return Row("cross-validation", case, name, seconds, "s", ratio, note)

    if isinstance(peer, str):
        return row(None, peer)
    n_test = n // N_FOLDS
    matrix = 4 * n_test * (n - n_test)  # bytes, for each lambda
    if 6 * matrix > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):  # it makes copies
        return row(
            None, f"not run: a (held-out x training) matrix needs {matrix / 1e9:.1f} GB for each lambda"
        )
    x, y = sources.numpy(), targets.numpy()
    mean_diagonal = x.var(0, dtype=np.float64).mean() * (n - n_test)
    alphas = (np.array(LAMBDAS) * mean_diagonal).astype(np.float32)
    try:
        if n > FULL_HIMALAYA:
            note = f"one fold timed with 1 and with 2 lambdas, scaled to {N_FOLDS} x {len(alphas)}, no refit"
            return row(scale_himalaya(peer, x, y, alphas), note)
        # One lambda is shared by all targets, as in ours.
        options = {"local_alpha": False, "n_alphas_batch": min(max(1, int(5e8 / matrix)), len(alphas))}
        model = peer.RidgeCV(alphas=alphas, fit_intercept=True, cv=N_FOLDS, solver_params=options)
        return row(best_of(1, lambda: model.fit(x, y))[0], "run in full, once")
    except PEER_ERRORS as error:
        return row(None, reason(error))


def scale_himalaya(peer: ModuleType, x: np.ndarray, y: np.ndarray, alphas: np.ndarray) -> float:
    """Return the seconds of all folds and lambdas, from one fold with one and with two lambdas."""
    n_test, middle = len(x) // N_FOLDS, len(alphas) // 2
    options = {
        "n_iter": np.ones((1, 1), dtype=np.float32),
        "fit_intercept": True,
        "cv": [(np.arange(n_test, len(x)), np.arange(n_test))],
        "local_alpha": False,
        "n_alphas_batch": 1,
        "return_weights": False,
        "progress_bar": False,
    }

    def seconds_with(n_alphas: int) -> float:
        chosen = alphas[middle : middle + n_alphas]
        return best_of(1, lambda: peer.solve_group_ridge_random_search([x], y, alphas=chosen, **options))[0]

    one, two = seconds_with(1), seconds_with(2)
    return N_FOLDS * (one + (len(alphas) - 1) * max(two - one, 0.0))


def cross_validation_rows(sizes: Sequence[int], skip_peers: bool) -> list[Row]:
    """Time cross-validation with each number of pairs."""
    peak = matrix_peak(torch.float64) / 1e9
    rows = [Row("cross-validation", "", "float64 matrix product, peak", peak, "GFLOP/s")]
    for n in sizes:
        case = f"{n:,} pairs"
        logger.info("cross-validation, %s", case)
        sources, targets = synthetic_pairs(n)
        ours, best = best_of(REPEATS, lambda x=sources, y=targets: run_ours(x, y, 0))
        note = f"sums of all pairs and cross-validation, what the others do; best of {REPEATS}"
        rows.append(Row("cross-validation", case, "ours", ours, "s", note=note))
        whole, _ = best_of(REPEATS, lambda x=sources, y=targets: run_ours(x, y, DEFAULT_SAMPLE))
        note = f"with the shuffled control and retrieval accuracy; best of {REPEATS}"
        rows.append(Row("cross-validation", case, "ours with controls", whole, "s", whole / ours, note))
        if not skip_peers:
            rows += sklearn_rows(sources, targets, best, case, ours)
            rows.append(himalaya_row(sources, targets, case, ours))
    return rows


# Part 2: memory


def peak_memory() -> float:
    """Return this process's peak resident memory in MiB.

    On Linux children inherit the `ru_maxrss` of their parent, so the kernel's own number is preferred.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def fit_blocks(n: int) -> float:
    """Sum up and cross-validate n pairs made block by block; returns peak memory in MiB. 0: none."""
    if not n:
        return peak_memory()
    generator = torch.Generator().manual_seed(SEED)
    source, target = synthetic_pairs(BLOCK)
    statistics = PairStatistics(D_SOURCE, D_TARGET, N_FOLDS)
    for index, start in enumerate(range(0, n, BLOCK)):
        kept = min(BLOCK, n - start)
        scale = 1 + 0.2 * np.sin(index)
        noisy = [
            scale * fixed[:kept] + 0.01 * torch.randn(kept, fixed.shape[1], generator=generator)
            for fixed in (source, target)
        ]
        statistics.add(*noisy)
    RidgeMapping.from_statistics(statistics, "relative").cross_validate(lambda_values=LAMBDAS)
    return peak_memory()


def memory_in_subprocess(n: int) -> float:
    """Return the peak memory in MiB of a fresh process with one thread that fits n pairs."""
    logger.info("memory, %s pairs", f"{n:,}")
    return in_subprocess("--memory-of", str(n))


def in_subprocess(*arguments: str) -> Any:
    """Return what this script prints as JSON with other arguments, in a fresh process with one thread."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    # One thread, because the buffers of several change the peak by a tenth.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the run with {arguments} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def memory_rows(few: int, many: int) -> list[Row]:
    """Measure the peak with few and with many pairs."""
    empty, first, second = (memory_in_subprocess(n) for n in (0, few, many))
    note = f"peak of a process of its own with one thread; {empty:.0f} MiB of it for importing the libraries"
    growth = f"{many / few:.0f} times the pairs, {100 * (second / first - 1):+.1f} % memory"
    return [
        Row("memory", f"{few:,} pairs", "ours", first, "MiB", note=note),
        Row("memory", f"{many:,} pairs", "ours", second, "MiB", second / first, growth),
    ]


# Part 3: a band


def fit_band(width: int, n_pairs: int, kinds: Sequence[str]) -> dict[str, float]:
    """Sum up and fit a band of layer pairs with two lexical controls; returns CPU seconds and peak MiB.

    Layers have this width on both sides. kinds: of the comparison maps, beside the shuffled pairs.
    """
    generator = torch.Generator().manual_seed(SEED)
    layers = [(layer * width, (layer + 1) * width) for layer in range(n_pairs + N_LEXICAL)]
    controls = [[(layer, target) for target in layers[:n_pairs]] for layer in layers[n_pairs:]]
    band = list(zip(layers[:n_pairs], layers[:n_pairs], strict=True))
    joined = [*band, *(pair for pairs in controls for pair in pairs)]
    d_source, d_target = width * len(layers), width * n_pairs
    started = time.process_time()
    statistics = PairStatistics(d_source, d_target, N_FOLDS, joined=joined)
    for start in range(0, BAND_ROWS, BLOCK // 4):
        n = min(BLOCK // 4, BAND_ROWS - start)
        hidden, noise = (torch.randn(n, width, generator=generator) for _ in range(2))
        sides = (
            torch.cat([hidden + noise.roll(shift, 1) for shift in range(d // width)], 1)
            for d in (d_source, d_target)
        )
        statistics.add(*sides)
    summed = time.process_time()
    for pair in band:
        ridge = RidgeMapping.from_statistics(statistics.of_pair(*pair), "relative")
        ridge.cross_validate(lambda_values=LAMBDAS)
        ridge.analyze()
        for kind in ("shuffled_pairs", *kinds):
            for draw, _ in enumerate(vector_names(kind)):
                ComparisonMap.fitted(kind, ridge, draw)
    fitted = time.process_time()
    for pairs in controls:
        before: RidgeMapping | None = None
        for pair in pairs:
            ridge = RidgeMapping.from_statistics(statistics.of_pair(*pair), "relative")
            ridge.cross_validate(lambda_values=LAMBDAS, beside=before, is_control=True)
            before = ridge
    seconds = {"sums": summed - started, "maps": fitted - summed, "controls": time.process_time() - fitted}
    return {**seconds, "peak": peak_memory()}


def band_rows(widths: Sequence[int], n_pairs: int) -> list[Row]:
    """Measure a band of each width, without and with the comparison maps that no verdict needs."""
    rows = []
    for width in widths:
        for kinds in ((), ("procrustes", "reduced_rank")):
            case = f"{n_pairs} layer pairs of {width}, {BAND_ROWS:,} pairs of activations"
            logger.info("band, %s", case)
            found = in_subprocess("--band-of", str(width), str(n_pairs), *kinds)
            method = ", ".join(("ridge, shuffled pairs, controls", *kinds))
            for name, value in found.items():
                rows.append(Row("band", case, f"{method}: {name}", value, "MiB" if name == "peak" else "s"))
    return rows


# Part 4: extraction


def matrix_peak(dtype: torch.dtype = torch.float32) -> float:
    """Return the best rate of square products, in floating-point operations a second."""
    best = 0.0
    for size in (1024, 2048):
        left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        seconds, _ = best_of(8, lambda a=left, b=right: a @ b)
        best = max(best, 2 * size**3 / seconds)
    return best


def our_readers(model: nn.Module, tokenizer: Any) -> list[Reader]:
    """Return our readers with the default batch size."""
    from activation_extractor import ActivationExtractor  # the memory part must not load transformers

    extractor = ActivationExtractor(model, tokenizer, LAYER)

    def read_word_ends(texts: list[str]) -> Tensor:
        tokens, ends = extractor.token_ends(texts)
        return extractor.extract_tokens(tokens, [list(found.values()) for found in ends], [LAYER])[LAYER]

    batches = f"batches of {extractor.batch_size}, sorted by length, stops after block {LAYER}"
    return [
        Reader("ours, last tokens", extractor.extract_batch, batches),
        Reader("ours, every token end", read_word_ends, batches, last=False),
    ]


def plain_reader(model: nn.Module, tokenizer: Any) -> Reader:
    """Return a plain loop over texts that reads all hidden states."""

    def read(texts: list[str]) -> Tensor:
        rows = []
        for text in texts:
            with torch.inference_mode():
                output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            rows.append(output.hidden_states[LAYER + 1][0, -1])
        return torch.stack(rows)

    return Reader("plain loop over output_hidden_states", read, "one text at a time")


def steering_vectors_readers(model: nn.Module, tokenizer: Any) -> list[Reader] | str:
    """Return steering-vectors' extraction at its default batch size and at ours, or why there is none."""
    peer = import_peer("steering_vectors.train_steering_vector")
    if isinstance(peer, str):
        return peer

    def reader(batch_size: int, note: str) -> Reader:
        def read(texts: list[str]) -> Tensor:
            # It reads contrast pairs, so neighbouring texts are given as the two sides.
            samples = list(zip(texts[::2], texts[1::2], strict=True))
            sides = peer.extract_activations(model, tokenizer, samples, layers=[LAYER], batch_size=batch_size)
            return torch.stack([torch.cat(side[LAYER]) for side in sides], dim=1).flatten(0, 1)

        return Reader(f"steering-vectors, batches of {batch_size}", read, note)

    return [reader(1, "record_activations in extract_activations, its default"), reader(8, "same, our batch")]


def repeng_readers(model: nn.Module, tokenizer: Any) -> list[Reader] | str:
    """Return repeng's extraction at its default batch size, or why there is none."""
    peer = import_peer("repeng.extract")
    if isinstance(peer, str):
        return peer

    def read(texts: list[str]) -> Tensor:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            found = peer.batched_get_hiddens(model, tokenizer, texts, [LAYER], batch_size=32)
        return torch.from_numpy(found[LAYER])

    return [Reader("repeng, batches of 32", read, "batched_get_hiddens, its default")]


def linear_work(model: nn.Module, reader: Reader, text: str, n_tokens: int) -> float:
    """Return how many weights of linear layers multiply each token, counted while `reader` runs."""
    counted = 0

    def count(module: nn.Linear, args: tuple, output: Tensor) -> None:
        nonlocal counted
        counted += module.weight.numel() * (output.numel() // output.shape[-1])

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(count).remove)
        reader.read([text, text])
    return counted / (2 * n_tokens)


def time_readers(readers: Sequence[Reader], texts: list[str]) -> dict[str, tuple[float, Tensor] | str]:
    """Return for each reader its best seconds and its rows, or the reason why it failed, in rotation."""
    found: dict[str, tuple[float, Tensor] | str] = {}
    for round_ in range(REPEATS + 1):  # the first round warms up on a few texts
        for reader in readers:
            if isinstance(found.get(reader.name), str):
                continue
            logger.info("extraction, %s, %s", reader.name, f"round {round_}" if round_ else "warm-up")
            try:
                given = texts if round_ else texts[:4]
                seconds, rows = best_of(1, lambda r=reader, t=given: r.read(t))
            except PEER_ERRORS as error:
                if reader.name.startswith("ours"):
                    raise
                found[reader.name] = reason(error)
                continue
            if round_:
                before = found.get(reader.name, (seconds,))[0]
                found[reader.name] = (min(seconds, before), rows)
    return found


def all_readers(model: nn.Module, tokenizer: Any, skip_peers: bool) -> tuple[list[Reader], dict[str, str]]:
    """Return the readers, ours first, and peer -> why it is missing."""
    readers, missing = [*our_readers(model, tokenizer), plain_reader(model, tokenizer)], {}
    if skip_peers:
        return readers, missing
    for name, make in (("steering-vectors", steering_vectors_readers), ("repeng", repeng_readers)):
        made = make(model, tokenizer)
        if isinstance(made, str):
            missing[name] = made
        else:
            readers += made
    return readers, missing


def extraction_rows(n_texts: int, skip_peers: bool) -> list[Row]:
    """Time every way to read the same passages."""
    from model_loading import load_model, quiet_transformers  # the memory part must not load these
    from texts.neutral_text import load_neutral_texts

    quiet_transformers()
    model, tokenizer = load_model(SOURCE_MODEL, device="cpu", dtype="float32")
    texts = [item.text for item in load_neutral_texts("wikipedia-sample", n_texts)]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    n_tokens = sum(lengths)
    readers, missing = all_readers(model, tokenizer, skip_peers)
    peak = matrix_peak()
    found = time_readers(readers, texts)
    peak = max(peak, matrix_peak())
    case = f"{n_texts} passages, {n_tokens:,} tokens, {SOURCE_MODEL} block {LAYER}"
    our_seconds, our_last = found[readers[0].name]
    rows = [Row("extraction", case, "float32 matrix product, peak", peak / 1e9, "GFLOP/s")]
    for reader in readers:
        timed = found[reader.name]
        if isinstance(timed, str):
            rows.append(Row("extraction", case, reader.name, None, "tokens/s", note=timed))
            continue
        seconds, values = timed
        work = linear_work(model, reader, texts[0], lengths[0])
        share = 2 * work * n_tokens / seconds / peak
        details = {"fraction_of_peak": share, "weights_per_token": work}
        note = f"{reader.note}; {share:.0%} of peak; {work / 1e6:.0f} M weights a token"
        if reader.last and reader is not readers[0]:
            details["difference_from_ours"] = relative_difference(values, our_last)
            note += f"; differs from ours by {details['difference_from_ours']:.0e}"
        ratio = None if reader is readers[0] else our_seconds / seconds
        rows.append(
            Row("extraction", case, reader.name, n_tokens / seconds, "tokens/s", ratio, note, details)
        )
    return rows + [Row("extraction", case, name, None, "tokens/s", note=why) for name, why in missing.items()]


def relative_difference(values: Tensor, expected: Tensor) -> float:
    """Return the largest norm of a row's difference over that of the row."""
    return ((values - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


# Output


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    meaning = {"s": "the time", "MiB": "the memory", "tokens/s": "the speed"}
    header = ("Part", "Case", "Method", "Measured", "Against ours", "Notes")
    lines = []
    for row in rows:
        digits = 2 if row.unit == "s" else 0
        measured = "–" if row.value is None else f"{row.value:,.{digits}f} {row.unit}"
        against = "" if row.ratio is None else f"{row.ratio:,.3g}× {meaning[row.unit]}"
        lines.append((row.part, row.case, row.method, measured, against, row.note))
    return markdown_table(header, lines, left=("Part", "Case", "Method", "Notes"))


def machine() -> dict[str, Any]:
    """Return the machine's properties on which the numbers depend."""
    return {
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[50_000, 200_000], help="synthetic pairs")
    parser.add_argument("--texts", type=int, default=96, help="passages to read, an even number from 4")
    parser.add_argument("--skip-peers", action="store_true", help="time only ours and the plain loop")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file too")
    parser.add_argument(
        "--memory-of", type=int, metavar="N", help="print only the peak memory in MiB with this many pairs"
    )
    parser.add_argument(
        "--band", type=int, nargs="+", metavar="WIDTH", help="time only bands of these widths"
    )
    parser.add_argument("--band-pairs", type=int, default=9, help="layer pairs of a band")
    parser.add_argument(
        "--band-of",
        nargs="+",
        metavar=("WIDTH", "PAIRS"),
        help="print only what one band takes; and kinds of maps",
    )
    arguments = parser.parse_args()
    if arguments.texts < 4 or arguments.texts % 2:
        parser.error(f"--texts is {arguments.texts}, expected an even number from 4")
    if min(arguments.pairs) < D_SOURCE:
        parser.error(f"--pairs is {arguments.pairs}, expected {D_SOURCE} or more")
    return arguments


def main() -> None:
    """Measure everything, memory first, because it needs most of the machine's."""
    arguments = parse_arguments()
    if arguments.memory_of is not None:
        print(f"{fit_blocks(arguments.memory_of):.1f}")
        return
    if arguments.band_of is not None:
        width, n_pairs, *kinds = arguments.band_of
        print(json.dumps(fit_band(int(width), int(n_pairs), kinds)))
        return
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    quick, found_machine = arguments.quick, machine()
    logger.info("%s", found_machine)
    if arguments.band:
        print(markdown(band_rows(arguments.band, arguments.band_pairs)))
        return
    sizes = [2_000] if quick else sorted({FULL_HIMALAYA, *arguments.pairs})
    rows = memory_rows(20_000, 40_000 if quick else 2_000_000)
    rows += cross_validation_rows(sizes, arguments.skip_peers)
    rows += extraction_rows(8 if quick else arguments.texts, arguments.skip_peers)
    print(markdown(rows))
    if arguments.output:
        save_json(arguments.output, {"machine": found_machine, "rows": [asdict(row) for row in rows]})
        logger.info("wrote %s", arguments.output)


if __name__ == "__main__":
    main()
