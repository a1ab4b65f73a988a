"""Tune an encoder on the labelled texts of all shipped personas at once (phase 5; `python -m scoring.train`).

A head that has an output for each trait, and one for words in order, is trained together with the encoder on
the pool of `scoring.training_texts`, and thrown away. What stays are features in which traits stand apart.
"""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from scoring.encoders import SENTENCE_ENCODER, StateReader, untuned
from scoring.training_texts import Row, natural_rows, training_rows
from texts.personas import load_persona, shipped_personas

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
SORTED_BATCHES = 16  # among so many batches, texts of like lengths are read together
WARM_UP = 0.06  # share of the steps
HEAD_RATE, WEIGHT_DECAY, LONGEST_GRADIENT = 2e-3, 0.01, 1.0
# What a text weighs for a trait: its own persona's, any other persona's, and texts of no persona's.
OWN_POSITIVE, OWN_NEGATIVE, OF_OTHER, OF_NONE = 6.0, 3.0, 0.5, 1.0


@dataclass(frozen=True)
class Tuning:
    """How long and how fast an encoder is tuned. n_pools: draws of the pool, which epochs take in turn."""

    n_epochs: int
    rate: float
    n_pools: int


SENTENCES = Tuning(n_epochs=2, rate=1.5e-4, n_pools=2)
STATES = Tuning(n_epochs=4, rate=5e-4, n_pools=1)  # of a text, states are read once


def tune(name: str, texts: Sequence[Row] | None = None) -> dict[str, Tensor]:
    """Return what tuning changes of an encoder, see its `load`.

    name: see `scoring.encoders.encoder`. texts: from `natural_rows`, by default of the shipped personas.
    """
    torch.manual_seed(0)
    generator = random.Random(0)
    module, traits = untuned(name), shipped_personas()
    tuning = SENTENCES if name == SENTENCE_ENCODER else STATES
    whole = natural_rows(list(map(load_persona, traits))) if texts is None else texts
    pools = [_pool(module, training_rows(whole, seed), traits) for seed in range(tuning.n_pools)]
    if isinstance(module, StateReader):
        module.standardise(pools[0].inputs[::10])
    head = nn.Linear(module.n_features, len(traits) + 1)
    tuned = [weights for weights in module.parameters() if weights.requires_grad]
    groups = [{"params": tuned, "lr": tuning.rate}, {"params": head.parameters(), "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    n_steps = sum(
        len(list(pools[epoch % len(pools)].batches(random.Random(0)))) for epoch in range(tuning.n_epochs)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / (WARM_UP * n_steps)) * max(0.0, 1 - step / n_steps)
    )
    module.train()
    for epoch in range(tuning.n_epochs):
        pool, losses = pools[epoch % len(pools)], []
        for batch in pool.batches(generator):
            found = head(module([pool.inputs[index] for index in batch]))
            loss = binary_cross_entropy_with_logits(found, pool.labels[batch], pool.weights[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(tuned, LONGEST_GRADIENT)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        logger.info("%s, epoch %d of %d: loss %.3f", name, epoch + 1, tuning.n_epochs, np.mean(losses))
    return module.tuned()


@dataclass(frozen=True)
class _Pool:
    """What an encoder reads of the texts of a pool, and (n, traits + 1) labels and weights."""

    inputs: list
    lengths: list[int]
    labels: Tensor
    weights: Tensor

    def batches(self, generator: random.Random) -> Iterator[list[int]]:
        """Yield the indices of batches, whose texts are of like lengths, in random order."""
        order = generator.sample(range(len(self.inputs)), len(self.inputs))
        step = BATCH_SIZE * SORTED_BATCHES
        batches = []
        for start in range(0, len(order), step):
            part = sorted(order[start : start + step], key=self.lengths.__getitem__)
            batches += [part[first : first + BATCH_SIZE] for first in range(0, len(part), BATCH_SIZE)]
        generator.shuffle(batches)
        return iter(batches)


def _pool(module: nn.Module, rows: Sequence[Row], traits: Sequence[str]) -> _Pool:
    labels, weights = torch.zeros(2, len(rows), len(traits) + 1)
    for index, row in enumerate(rows):
        weights[index] = OF_OTHER if row.kind in ("positive", "negative", "resembling") else OF_NONE
        if row.persona in traits and row.kind != "degenerate":
            own, is_positive = traits.index(row.persona), row.kind == "positive"
            labels[index, own] = is_positive
            weights[index, own] = OWN_POSITIVE if is_positive else OWN_NEGATIVE
        weights[index, [traits.index(name) for name in row.may_show]] = 0
        labels[index, -1], weights[index, -1] = row.kind != "degenerate", OF_NONE
    texts = [row.text for row in rows]
    return _Pool(module.read(texts), list(map(len, texts)), labels, weights)
