"""Score how strongly a text shows a trait by a second, independent measure: a likelihood ratio (phase 5).

A language model reads labelled texts that show the trait, then the text; texts that say the same without
it, then the text; and texts that show other traits, those nearest to this one, then the text. The differences
of the text's log-likelihoods, per token, say after which it is the more expected. After some thirty tokens a
text itself says how it goes on, whatever stands before: so of a longer one three windows of about that length
are read, each right behind the examples. A logistic regression on the two differences to the first, trained
on labelled texts that the model has not read before, makes them a probability. Broken text is unlikely after
all of them, so a second regression, on the greatest of the log-likelihoods, tells texts from their shuffled
words, and a text's score is the product: p(style) x p(words in order), or 0 if it does nothing but repeat
itself.

The model is the packaged SmolLM2-135M-Instruct, whichever models the run is about, so that the scores of
different runs mean the same. Nothing of it is the sentence encoder, and no steering vector is made from
what is measured here.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any

import joblib
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
from scoring.trait_classifier import FALSE_POSITIVES, IN_ORDER
from support.artifacts import fingerprint
from support.package_cache import build_once, cache_folder
from texts.personas import Persona, load_prompts

SCORING_MODEL = "smollm2-135m-instruct"
N_EXAMPLES = 12  # labelled texts that are read before
N_TRAINING = 30  # of each kind, from which the regression learns; of other traits, twice as many
NEAREST_OF = 150  # texts of other traits, among which those are looked for that are the most like the trait
BATCH_SIZE = 16
WINDOW = 24  # tokens that are read in one go, about: as many as labelled texts have
N_WINDOWS = 3  # of a longer text that are read, from its beginning to its end
ROW = 128  # tokens of windows that are read side by side
FILE = "likelihood_ratio.joblib"
INTRODUCTION = "Texts in the same style:\n\n"

Scorer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@cache
def load_scoring_model() -> Scorer:
    """Return the packaged language model, in the dtype in which this machine is fastest."""
    model, tokenizer = load_model(SCORING_MODEL)
    return model.to(fastest_dtype(model.device, model.dtype)), tokenizer


@dataclass(frozen=True)
class LikelihoodRatio:
    """A persona's scorer.

    examples: what is read before a text: texts that show the trait, such that do not, and such that show
        other traits, each kind as one text; without other personas, the first two.
    threshold: as of a `TraitClassifier`. style, order: the two regressions.
    """

    persona: str
    examples: tuple[str, ...] = field(repr=False)
    threshold: float
    style: Pipeline = field(repr=False)
    order: Pipeline = field(repr=False)
    scorer: Scorer = field(repr=False)

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """Return each text's probability of the trait, None for an empty text. Equal texts are read once."""
        unique = dict.fromkeys(text.strip() for text in texts if text.strip())
        known = {text: 0.0 for text in unique if has_collapsed(text)}
        if read := [text for text in unique if text not in known]:
            features = likelihood_features(self.scorer, self.examples, read)
            probabilities = _probabilities(self.style, self.order, features)
            known |= zip(read, map(float, probabilities), strict=True)
        return [known.get(text.strip()) for text in texts]


def likelihood_features(scorer: Scorer, examples: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Return (n, examples), in nats per token: log-likelihoods after the first examples, less those after
    each of the others; and, last, the greatest of them all.
    """
    shows, *lack = (_log_likelihoods(scorer, example, texts) for example in examples)
    return np.stack([*(shows - each for each in lack), np.max([shows, *lack], axis=0)], axis=1)


@lru_cache(maxsize=32)
@torch.inference_mode()
def _read_before(scorer: Scorer, before: str) -> tuple[Cache, int]:
    """Return the keys and values of what stands before texts, but for its last token, and that token.

    That one is read with each text, for what it says of the text's first.
    """
    model, tokenizer = scorer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else filler_token_id(model)
    *read, last = start, *tokenizer(before, add_special_tokens=False)["input_ids"]
    prefix = torch.tensor([read], device=model.device)
    return model(input_ids=prefix, use_cache=True).past_key_values, last


def _log_likelihoods(scorer: Scorer, before: str, texts: Sequence[str]) -> np.ndarray:
    """Return the mean log-likelihood of the tokens of each text's windows, right after what stands before.

    That is read once, and windows share the rows of a batch, where they do not see each other.
    """
    encoded = scorer[1](list(texts), add_special_tokens=False)["input_ids"]
    windows = [(text, window) for text, ids in enumerate(encoded) for window in _windows(ids)]
    sums = _window_sums(scorer, before, [window for _, window in windows])
    text_of = [text for text, _ in windows]
    return np.bincount(text_of, sums) / np.bincount(text_of, [len(window) for _, window in windows])


def _windows(ids: Sequence[int]) -> list[Sequence[int]]:
    """Return parts of about WINDOW tokens of a text: all, or of many the first, the last and some between."""
    n_windows = max(1, round(len(ids) / WINDOW))
    edges = [len(ids) * number // n_windows for number in range(n_windows + 1)]
    windows = [ids[start:end] for start, end in pairwise(edges)]
    if n_windows <= N_WINDOWS:
        return windows
    return [windows[round(number * (n_windows - 1) / (N_WINDOWS - 1))] for number in range(N_WINDOWS)]


@torch.inference_mode()
def _window_sums(scorer: Scorer, before: str, windows: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-likelihood of each window after what stands before."""
    model = scorer[0]
    cached, last = _read_before(scorer, before)
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
        following = place.roll(-1, dims=1) > place  # of the same window
        state = copy.deepcopy(cached)
        state.batch_repeat_interleave(len(batch))
        with narrowed_head(model, lambda hidden: hidden[following][None]):
            output = model(
                input_ids=padded, attention_mask=mask, position_ids=n_before + place, past_key_values=state
            )
        found = token_log_likelihoods(output.logits[0], padded.roll(-1, dims=1)[following])
        parts = iter(found.split([len(windows[window]) for row in batch for window in row]))
        return [[next(parts).sum().item() for _ in row] for row in batch]

    lengths = [sum(len(tokens[window]) for window in row) for row in rows]
    found = run_in_batches(run, lengths, BATCH_SIZE, "likelihood ratios", quiet=True)
    of_window = dict(zip(chain(*rows), chain(*found), strict=True))
    return [of_window[window] for window in range(len(windows))]


def _shared_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Return the windows of each row, which they fill together."""
    rows: list[list[int]] = []
    room = 0
    for window in sorted(range(len(lengths)), key=lambda window: -lengths[window]):
        if lengths[window] > room:
            rows.append([])
            room = ROW
        rows[-1].append(window)
        room -= lengths[window]
    return rows


def train_likelihood_ratios(
    names: Sequence[str], personas: Sequence[Persona], load: Callable[[], Scorer] = load_scoring_model
) -> dict[str, LikelihoodRatio]:
    """Train a scorer for each named persona that has labelled texts.

    personas: everything whose labelled texts may serve as negatives. load: returns the language model.
    """
    wanted = [persona for persona in personas if persona.name in names and persona.labelled_positive]
    return {persona.name: _train(persona, personas, load()) for persona in wanted}


def load_likelihood_ratios(names: Sequence[str], personas: Sequence[Persona]) -> dict[str, LikelihoodRatio]:
    """Return what `train_likelihood_ratios` does, each trained once for the same texts (40 s a persona)."""
    personas, found = sorted(personas, key=lambda persona: persona.name), {}
    for name in names:

        def build(folder: Path, name: str = name) -> None:
            trained = train_likelihood_ratios([name], personas)
            joblib.dump([replace(scorer, scorer=None) for scorer in trained.values()], folder / FILE)

        for trained in joblib.load(build_once(_cache_entry(name, personas), build) / FILE):
            found[name] = replace(trained, scorer=load_scoring_model())
    return found


def untrained_likelihood_ratios(names: Sequence[str], personas: Sequence[Persona]) -> list[str]:
    """Return the names whose scorer `load_likelihood_ratios` would have to train."""
    labelled = {persona.name for persona in personas if persona.labelled_positive}
    return [
        name
        for name in names
        if name in labelled and not (cache_folder() / _cache_entry(name, personas)).is_dir()
    ]


def remembered(
    scorer: LikelihoodRatio, personas: Sequence[Persona], texts: Sequence[str]
) -> Callable[[Sequence[str]], list[float | None]]:
    """Return the scorer's `score` for someone who asks about the same texts in every run: they are read once.

    scorer, personas: of `load_likelihood_ratios`.
    """

    def build(folder: Path) -> None:
        joblib.dump(scorer.score(texts), folder / FILE)

    entry = build_once(_scores_entry(scorer.persona, personas, texts), build)
    known = dict(zip(texts, joblib.load(entry / FILE), strict=True))

    def score(asked: Sequence[str]) -> list[float | None]:
        new = [text for text in asked if text not in known]
        found = known | dict(zip(new, scorer.score(new), strict=True))
        return [found[text] for text in asked]

    return score


def are_remembered(name: str, personas: Sequence[Persona], texts: Sequence[str]) -> bool:
    """Return whether a persona's scorer has read these texts for `remembered`."""
    return (cache_folder() / _scores_entry(name, personas, texts)).is_dir()


def _scores_entry(name: str, personas: Sequence[Persona], texts: Sequence[str]) -> str:
    return f"{_cache_entry(name, personas)}_{fingerprint(list(texts))[:32]}"


def _cache_entry(name: str, personas: Sequence[Persona]) -> str:
    cache_key = fingerprint(name, likelihood_ratio_fingerprint(personas), sklearn.__version__)
    return f"likelihood_ratios/{cache_key[:32]}"


def likelihood_ratio_fingerprint(personas: Sequence[Persona]) -> str:
    """Return what the scorers made from these personas depend on."""
    ordered = sorted(personas, key=lambda persona: persona.name)
    rows = [[each.name, each.labelled_positive, each.labelled_negative] for each in ordered]
    settings: list[Any] = [
        FALSE_POSITIVES,
        IN_ORDER,
        SCORING_MODEL,
        N_EXAMPLES,
        N_TRAINING,
        NEAREST_OF,
        WINDOW,
        N_WINDOWS,
        INTRODUCTION,
    ]
    return fingerprint(
        rows,
        load_prompts("ordinary_training"),
        settings,
        str(fastest_dtype(torch.device("cpu"), torch.float32)),
    )


def _train(persona: Persona, personas: Sequence[Persona], scorer: Scorer) -> LikelihoodRatio:
    generator = random.Random(0)
    sides = [list(persona.labelled_positive), list(persona.labelled_negative)]
    for side in sides:
        random.Random(1).shuffle(side)  # of paired sides, in the same order
    n_read = min(N_EXAMPLES, min(map(len, sides)) // 2)
    positive, negative = (side[n_read : n_read + N_TRAINING] for side in sides)
    examples = [_as_examples(side[:n_read]) for side in sides]
    others = _of_others(persona, personas, generator)
    if n_others := min(N_EXAMPLES, len(others) // 2):
        near = _nearest(scorer, examples, others[:NEAREST_OF])[: 2 * n_others]
        examples.append(_as_examples(near[::2]))
        others = [*near[1::2], *(text for text in others if text not in near)]
    others = others[: 2 * N_TRAINING]
    ordinary = load_prompts("ordinary_training")[:N_TRAINING]
    natural = [*positive, *(any_cut(text, generator) for text in positive), *negative, *others, *ordinary]
    labels = np.arange(len(natural)) < 2 * len(positive)
    long = [number for number, text in enumerate(natural) if can_be_corrupted(text)]
    broken = [shuffled(natural[number], generator) for number in long]
    features = likelihood_features(scorer, examples, [*natural, *broken])
    of_natural, of_broken = features[: len(natural)], features[len(natural) :]
    style = _regression().fit(of_natural[:, :-1], labels)
    order = _regression().fit(
        np.concatenate([of_natural[long, -1:], of_broken[:, -1:]]), np.repeat([True, False], len(long))
    )
    without = [_probabilities(style, order, each) for each in (of_natural[~labels], of_broken)]
    threshold = max(0.5, *(float(np.quantile(each, 1 - FALSE_POSITIVES)) for each in without))
    return LikelihoodRatio(persona.name, tuple(examples), threshold, style, order, scorer)


def _as_examples(texts: Sequence[str]) -> str:
    return INTRODUCTION + "\n\n".join(texts) + "\n\n"


def _nearest(scorer: Scorer, examples: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return the texts, those first that are most like what shows the trait: what is hard to tell from it."""
    ratio = likelihood_features(scorer, examples, texts)[:, 0]
    return [texts[index] for index in np.argsort(-ratio, kind="stable")]


def _of_others(persona: Persona, personas: Sequence[Persona], generator: random.Random) -> list[str]:
    """Return the labelled texts that show other traits: one of each in turn, in an order of chance."""
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


def main() -> None:
    """Check on a tiny model that texts have the same features one by one as together."""
    from support.tiny_models import tiny_model, tiny_tokenizer

    scorer = (tiny_model(), tiny_tokenizer())
    texts = ["The sea is blue.", "Rain falls on the hill and on the sea."]
    examples = ("The sea is blue.\n\n", "Rain\n\n", "On the hill\n\n")
    together = likelihood_features(scorer, examples, texts)
    alone = [likelihood_features(scorer, examples, [text])[0] for text in texts]
    assert np.allclose(together, alone, atol=1e-4)
    print(f"likelihood_ratio OK: {together[0, 0]:+.3f} nats a token")


if __name__ == "__main__":
    main()
