"""Tune the sentence encoder on all traits at once (work in progress: not yet used by a run).

    python -m scoring.tune_encoder FILE

Blocks of the packaged MiniLM are trained together with a head that has an output for each shipped trait, and
one for words in order, on the pool of `trait_scorer`. Writes encoder and head with `torch.save`.
"""

import math
import random
import sys

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModel, AutoTokenizer

from scoring.encoders import minilm_folder
from scoring.trait_scorer import ordinary_texts, training_rows
from texts.personas import load_persona, shipped_personas

N_EPOCHS = 5
BATCH_SIZE = 32
LEARNING_RATE = {"encoder": 1e-4, "head": 1e-3}
WARM_UP = 0.06  # share of the steps
LAYERS = (3, 6)  # hidden states whose means over tokens the head reads
LONGEST = 128  # tokens
POSITIVE, OWN_NEGATIVE = 6.0, 3.0  # weights of a trait's own texts


def main() -> None:
    """Tune and save."""
    torch.manual_seed(0)
    generator = random.Random(0)
    folder = minilm_folder()
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    encoder.embeddings.requires_grad_(False)
    names = shipped_personas()
    pool = pd.DataFrame(training_rows(list(map(load_persona, names)), ordinary_texts()))
    is_shuffled = pool.group.str.startswith("shuffled/").to_numpy()
    pool = pool[~is_shuffled | (np.arange(len(pool)) % 2 == 1)].reset_index(drop=True)
    labels, weights = np.zeros((2, len(pool), len(names) + 1), dtype=np.float32)
    weights += 1
    for column, name in enumerate(names):
        is_own, is_positive = pool.persona == name, pool.kind == "positive"
        labels[:, column] = is_own & is_positive
        weights[is_own & is_positive, column], weights[is_own & ~is_positive, column] = POSITIVE, OWN_NEGATIVE
    labels[:, -1] = pool.kind != "degenerate"
    head = nn.Linear(encoder.config.hidden_size * len(LAYERS), labels.shape[1])

    def features(texts: list[str]) -> Tensor:
        options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
        inputs = tokenizer(texts, **options)
        states = encoder(**inputs, output_hidden_states=True).hidden_states
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        return torch.cat([(states[layer] * mask).sum(1) / mask.sum(1) for layer in LAYERS], 1)

    trained = {"encoder": encoder, "head": head}
    groups = [
        {"params": [each for each in part.parameters() if each.requires_grad], "lr": LEARNING_RATE[name]}
        for name, part in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    n_steps = N_EPOCHS * math.ceil(len(pool) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / (WARM_UP * n_steps)) * max(0.0, 1 - step / n_steps)
    )
    encoder.train()
    for epoch in range(N_EPOCHS):
        order = list(range(len(pool)))
        generator.shuffle(order)
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            found = head(features([pool.text[index] for index in batch]))
            wanted, weight = torch.tensor(labels[batch]), torch.tensor(weights[batch])
            loss = binary_cross_entropy_with_logits(found, wanted, weight=weight)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(f"epoch {epoch + 1} of {N_EPOCHS}: loss {loss.item():.3f}", flush=True)
    torch.save({name: part.state_dict() for name, part in trained.items()}, sys.argv[1])


if __name__ == "__main__":
    main()
