"""Decode a batch of prompts token by token with a key-value cache (phase 4).

The loop of `model.generate` copies and searches all logits several times a step, which takes as
long as the model when the vocabulary is large. This one asks for the logits of the last position
only, hands them to a sampler as they are, and drops rows once an eighth of the batch has ended.
"""

import inspect
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from errors import InputError
from model_loading import pad_tokens
from output_head import narrowed_head
from tiny_models import ARCHITECTURES, tiny_model

# Dropping rows copies the cache, about as much as a sixth of a step.
DROP_FRACTION = 8


def check_decodable(model: PreTrainedModel) -> None:
    """Raise InputError for a model that does not take a key-value cache."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise InputError(
            f"{type(model).__name__} keeps its state elsewhere than in past_key_values and cannot be steered "
            "here; choose a model with attention"
        )


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choose: Callable[[Tensor, Tensor, int], Tensor],
    max_new_tokens: int,
    ends: Collection[int] = (),
    pad_id: int = 0,
    rows_change: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the token that ended it.

    prompts: token ids of each row; padded on the left.
    choose: (logits (rows, vocabulary), row indices (rows,), step) -> tokens (rows,). The logits
        are valid until the next step.
    ends: tokens that end a row.
    rows_change: told the indices of the rows in the batch, (rows,), whenever they change; for hooks
        that treat rows apart.
    """
    tokens, mask = pad_tokens(prompts, pad_id, "left", model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    cache = DynamicCache(config=model.config)
    rows = torch.arange(len(prompts), device=model.device)
    new: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()
    with narrowed_head(model, lambda hidden: hidden[:, -1:]):
        for step in range(max_new_tokens):
            options = {"position_ids": positions} if takes_positions else {}
            logits = model(
                input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **options
            ).logits[:, -1]
            chosen = choose(logits, rows, step).to(model.device)
            for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
                if token in ends:
                    ended.add(row)
                elif row not in ended:
                    new[row].append(token)
            if len(ended) == len(prompts):
                break
            is_left = torch.tensor([row not in ended for row in rows.tolist()], device=model.device)
            if (~is_left).sum() * DROP_FRACTION >= len(rows):
                kept = is_left.nonzero()[:, 0]
                rows, mask, chosen, positions = rows[kept], mask[kept], chosen[kept], positions[kept]
                cache.reorder_cache(kept)
                if rows_change is not None:
                    rows_change(rows)
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return new


def main() -> None:
    """Check on every tiny architecture that a batch decodes greedily as whole passes do one by one."""
    prompts = [[256, 5, 6, 7], [256, 9], [256, 30, 31, 32, 33, 34]]
    for name in ARCHITECTURES:
        model = tiny_model(name)
        together = decode(model, prompts, lambda logits, rows, step: logits.argmax(-1), 5)
        for prompt, new in zip(prompts, together, strict=True):
            tokens = torch.tensor([prompt])
            for _ in range(5):
                with torch.inference_mode():
                    tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
            assert tokens[0, len(prompt) :].tolist() == new, name
    print(f"decoding OK: batches equal one by one in {len(ARCHITECTURES)} architectures")


if __name__ == "__main__":
    main()
