"""Score how strongly a text shows a trait by a second, independent measure: a likelihood ratio (phase 5).

A language model reads a text after three prefixes: labelled texts that show the trait, labelled texts that
say the same without it, and the most similar texts that show other traits. A logistic regression turns the
differences between the text's log-likelihoods per token into a probability. After some thirty tokens a text
predicts its own continuation, whatever the prefix was: so three windows of about that length are read of a
longer text, each directly after the prefix. Degenerate text is unlikely after every prefix, so a second
regression, on the largest of the log-likelihoods, tells texts from their shuffled words. A text's score is
the product p(style) x p(words in order), or 0 if the text does nothing but repeat itself.

The model is the packaged SmolLM2-135M-Instruct, whichever models a run compares, so that the scores of
different runs mean the same. It shares nothing with the encoder of `trait_classifier`.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from itertools import chain, pairwise, zip_longest
from operator import attrgetter

import numpy as np
import sklearn
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from decoding.batching import run_in_batches
from decoding.output_head import narrowed_head, token_log_likelihoods
from model_loading import fastest_dtype, filler_token_id, load_model, pad_tokens
from scoring.degenerate_text import any_cut, can_be_corrupted, has_collapsed, shuffled
from scoring.trait_classifier import FALSE_POSITIVES, IN_ORDER, stored_form, trained_once
from support.artifacts import fingerprint
from support.package_cache import cache_folder
from texts.personas import Persona, load_prompts

SCORING_MODEL = "smollm2-135m-instruct"
N_EXAMPLES = 12  # labelled texts in a prefix
N_TRAINING = 30  # texts of each kind on which the regressions are trained; twice as many of other traits
NEAREST_OF = 150  # texts of other traits among which the most similar ones are sought
BATCH_SIZE = 16
WINDOW = 24  # tokens in a window, about; labelled texts have as many
N_WINDOWS = 3  # windows that are read of a longer text, from its beginning to its end
ROW = 128  # tokens of windows that share a row of a batch
INTRODUCTION = "Texts in the same style:\n\n"
VERSION = 2  # must be raised when training or what is stored changes, so that no older file is read

LanguageModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@cache
def load_scoring_model() -> LanguageModel:
    """Return the packaged language model, in the dtype in which this machine is fastest."""
    model, tokenizer = load_model(SCORING_MODEL)
    return model.to(fastest_dtype(model.device, model.dtype)), tokenizer


@dataclass(frozen=True)
class LikelihoodRatio:
    """A persona's scorer.

    prefixes: texts that show the trait, texts that do not, and, if there are other personas, texts that show
        other traits; each kind joined into one text.
    threshold: see `TraitClassifier`. style, order: the two regressions.
    language_model: the packaged one if None.
    """

    persona: str
    prefixes: tuple[str, ...] = field(repr=False)
    threshold: float
    style: Pipeline = field(repr=False)
    order: Pipeline = field(repr=False)
    language_model: LanguageModel | None = field(repr=False)

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """Return each text's probability of the trait, 0 for an empty text; equal texts are read once."""
        stripped = [text.strip() for text in texts]
        unique = list(dict.fromkeys(filter(None, stripped)))
        read = [text for text in unique if not has_collapsed(text)]
        scores = dict.fromkeys(unique, 0.0)
        if read:
            features = likelihood_features(self.language_model or load_scoring_model(), self.prefixes, read)
            scores |= zip(read, _probabilities(self.style, self.order, features).tolist(), strict=True)
        return [scores.get(text, 0.0) for text in stripped]


def likelihood_features(model: LanguageModel, prefixes: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Return (n texts, n prefixes) features, in nats per token.

    The log-likelihood after the first prefix minus that after each other one; in the last column, the largest
    log-likelihood of all.
    """
    shows, *lack = (_log_likelihoods(model, prefix, texts) for prefix in prefixes)
    return np.stack([*(shows - each for each in lack), np.max([shows, *lack], axis=0)], axis=1)


@lru_cache(maxsize=32)
@torch.inference_mode()
def _read_prefix(language_model: LanguageModel, prefix: str) -> tuple[Cache, int]:
    """Return the keys and values of a prefix without its last token, and that token.

    The last token is read again with each window, because its logits predict the window's first token.
    """
    model, tokenizer = language_model
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else filler_token_id(model)
    *read, last = start, *tokenizer(prefix, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([read], device=model.device)
    return model(input_ids=ids, use_cache=True).past_key_values, last


def _log_likelihoods(language_model: LanguageModel, prefix: str, texts: Sequence[str]) -> np.ndarray:
    """Return the mean log-likelihood of the tokens in each text's windows, directly after the prefix."""
    encoded = language_model[1](list(texts), add_special_tokens=False)["input_ids"]
    windows = [(text, window) for text, ids in enumerate(encoded) for window in _windows(ids)]
    sums = _window_sums(language_model, prefix, [window for _, window in windows])
    text_of = [text for text, _ in windows]
    return np.bincount(text_of, sums) / np.bincount(text_of, [len(window) for _, window in windows])


def _windows(ids: Sequence[int]) -> list[Sequence[int]]:
    """Return parts of about WINDOW tokens: all, or of many the first, the last and evenly spaced ones."""
    n_windows = max(1, round(len(ids) / WINDOW))
    edges = [len(ids) * number // n_windows for number in range(n_windows + 1)]
    windows = [ids[start:end] for start, end in pairwise(edges)]
    if n_windows <= N_WINDOWS:
        return windows
    return [windows[round(number * (n_windows - 1) / (N_WINDOWS - 1))] for number in range(N_WINDOWS)]


@torch.inference_mode()
def _window_sums(language_model: LanguageModel, prefix: str, windows: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-likelihood of each window after the prefix.

    The prefix is read once. Windows share the rows of a batch; a mask keeps them from seeing each other.
    """
    model = language_model[0]
    cached, last = _read_prefix(language_model, prefix)
    n_before = cached.get_seq_length()
    tokens = [[last, *window] for window in windows]
    rows = _shared_rows(list(map(len, tokens)))

    def run(indices: list[int]) -> list[list[float]]:
        batch = [rows[index] for index in indices]

        def laid_out(values: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
            in_rows = [[value for window in row for value in values[window]] for row in batch]
            return pad_tokens(in_rows, padding, "right", model.device)[0]

        padded = laid_out(tokens, filler_token_id(model))
        place = laid_out([range(len(ids)) for ids in tokens], 0)
        owner = laid_out([[window] * len(ids) for window, ids in enumerate(tokens)], -1)
        own = (owner[:, :, None] == owner[:, None]).tril()
        mask = torch.cat([own.new_ones(*padded.shape, n_before), own], 2)[:, None]
        is_followed = place.roll(-1, dims=1) > place  # by a token of the same window
        state = copy.deepcopy(cached)
        state.batch_repeat_interleave(len(batch))
        with narrowed_head(model, lambda hidden: hidden[is_followed][None]):
            output = model(
                input_ids=padded, attention_mask=mask, position_ids=n_before + place, past_key_values=state
            )
        found = token_log_likelihoods(output.logits[0], padded.roll(-1, dims=1)[is_followed])
        parts = iter(found.split([len(windows[window]) for row in batch for window in row]))
        return [[next(parts).sum().item() for _ in row] for row in batch]

    lengths = [sum(len(tokens[window]) for window in row) for row in rows]
    found = run_in_batches(run, lengths, BATCH_SIZE, "likelihood ratios", quiet=True)
    of_window = dict(zip(chain(*rows), chain(*found), strict=True))
    return [of_window[window] for window in range(len(windows))]


def _shared_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Return the windows of each row: the longest first, as many as fit into ROW tokens."""
    rows: list[list[int]] = []
    room = 0
    for window in sorted(range(len(lengths)), key=lambda window: -lengths[window]):
        if lengths[window] > room:
            rows.append([])
            room = ROW
        rows[-1].append(window)
        room -= lengths[window]
    return rows


def load_scorers(names: Sequence[str], personas: Sequence[Persona]) -> dict[str, LikelihoodRatio]:
    """Return a scorer of each named persona with labelled texts, trained once on this machine (40 s each).

    personas: every persona whose labelled texts may serve as negatives.
    """
    personas = sorted(personas, key=attrgetter("name"))
    by_name = {persona.name: persona for persona in personas if persona.labelled_positive}

    def train(name: str) -> LikelihoodRatio:
        trained = train_likelihood_ratio(by_name[name], personas, load_scoring_model())
        return replace(trained, language_model=None)

    wanted = [name for name in names if name in by_name]
    return {name: trained_once(_cache_entry(name, personas), partial(train, name)) for name in wanted}


def untrained(names: Sequence[str], personas: Sequence[Persona]) -> list[str]:
    """Return the names whose scorer `load_scorers` would have to train."""
    labelled = {persona.name for persona in personas if persona.labelled_positive}
    return [
        name
        for name in names
        if name in labelled and not (cache_folder() / _cache_entry(name, personas)).is_dir()
    ]


def _cache_entry(name: str, personas: Sequence[Persona]) -> str:
    return f"likelihood_ratios/{fingerprint(name, scorer_key(personas))[:32]}"


def scorer_key(personas: Sequence[Persona]) -> str:
    """Return what the scorers depend on, without training them; the order of personas does not matter."""
    ordered = sorted(personas, key=attrgetter("name"))
    rows = [[each.name, each.labelled_positive, each.labelled_negative] for each in ordered]
    settings = [FALSE_POSITIVES, IN_ORDER, SCORING_MODEL, N_EXAMPLES, N_TRAINING, NEAREST_OF, WINDOW]
    settings += [N_WINDOWS, INTRODUCTION, VERSION, stored_form(LikelihoodRatio), sklearn.__version__]
    dtype = str(fastest_dtype(torch.device("cpu"), torch.float32))
    return fingerprint(rows, load_prompts("ordinary_training"), settings, dtype)


def train_likelihood_ratio(
    persona: Persona, personas: Sequence[Persona], model: LanguageModel
) -> LikelihoodRatio:
    """Train the scorer of a persona with labelled texts; see `load_scorers`."""
    generator = random.Random(0)
    sides = [list(persona.labelled_positive), list(persona.labelled_negative)]
    for side in sides:
        random.Random(1).shuffle(side)  # the same order on both sides, so that pairs stay together
    n_read = min(N_EXAMPLES, min(map(len, sides)) // 2)
    positive, negative = (side[n_read : n_read + N_TRAINING] for side in sides)
    prefixes = [_as_prefix(side[:n_read]) for side in sides]
    others = _texts_of_others(persona, personas, generator)
    if n_others := min(N_EXAMPLES, len(others) // 2):
        # The texts most similar to those with the trait are the hardest to tell apart.
        ratio = likelihood_features(model, prefixes, others[:NEAREST_OF])[:, 0]
        near = [others[index] for index in np.argsort(-ratio, kind="stable")[: 2 * n_others]]
        prefixes.append(_as_prefix(near[::2]))
        others = [*near[1::2], *(text for text in others if text not in near)]
    cuts = [any_cut(text, generator) for text in positive]
    ordinary = load_prompts("ordinary_training")[:N_TRAINING]
    natural = [*positive, *cuts, *negative, *others[: 2 * N_TRAINING], *ordinary]
    is_positive = np.arange(len(natural)) < 2 * len(positive)
    long = [number for number, text in enumerate(natural) if can_be_corrupted(text)]
    shuffles = [shuffled(natural[number], generator) for number in long]
    features = likelihood_features(model, prefixes, [*natural, *shuffles])
    of_natural, of_shuffles = features[: len(natural)], features[len(natural) :]
    style = _regression().fit(of_natural[:, :-1], is_positive)
    largest = np.concatenate([of_natural[long, -1:], of_shuffles[:, -1:]])
    order = _regression().fit(largest, np.repeat([True, False], len(long)))
    without = [_probabilities(style, order, each) for each in (of_natural[~is_positive], of_shuffles)]
    threshold = max(0.5, *(float(np.quantile(each, 1 - FALSE_POSITIVES)) for each in without))
    return LikelihoodRatio(persona.name, tuple(prefixes), threshold, style, order, model)


def _as_prefix(texts: Sequence[str]) -> str:
    return INTRODUCTION + "\n\n".join(texts) + "\n\n"


def _texts_of_others(persona: Persona, personas: Sequence[Persona], generator: random.Random) -> list[str]:
    """Return the labelled texts that show other traits: one of each persona in rotation, in random order."""
    each_order = [
        generator.sample(each.labelled_positive, len(each.labelled_positive))
        for each in personas
        if each.name != persona.name
    ]
    return [text for texts in zip_longest(*each_order) for text in texts if text is not None]


def _regression() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))


def _probabilities(style: Pipeline, order: Pipeline, features: np.ndarray) -> np.ndarray:
    in_order = expit(order.decision_function(features[:, -1:]) - IN_ORDER)
    return style.predict_proba(features[:, :-1])[:, 1] * in_order
