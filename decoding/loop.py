"""Decode a batch of prompts token by token with a key-value cache (phase 4).

The loop of `model.generate` copies and searches all logits several times a step, which takes as
long as the model when the vocabulary is large. This one asks for the logits of the last position
only, of few tokens where few are read, and hands them to a sampler as they are. A prompt passes
through the model once for all rows that are alike, and rows leave once an eighth of them has ended.
"""

import inspect
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from decoding.output_head import narrowed_head
from model_loading import n_layers, pad_tokens
from support.errors import InputError

# Dropping rows copies the cache, which takes about a fifteenth of a step.
DROP_FRACTION = 8
# Preparing to screen the vocabulary takes as long as it saves in about 150 steps of a row.
SCREENED_ROW_STEPS = 512


def check_decodable(model: PreTrainedModel) -> None:
    """Raise InputError for a model that does not take a key-value cache."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise _other_state(model)


@torch.inference_mode()
def hides_left_padding(model: PreTrainedModel, pad_id: int) -> bool:
    """Tell whether a prompt has the same logits with masked padding on its left as without.

    A model that takes no position_ids may count padding as positions: Bart's decoder does, OPT's does not.
    """
    if "position_ids" in inspect.signature(model.forward).parameters:
        return True
    short, long = [5, 6, 7], [8, 9, 5, 6, 7]
    alone = _Batch(model, [short], pad_id, 1).read_prompts()[0].float()
    padded = _Batch(model, [short, long], pad_id, 1).read_prompts()[0].float()
    tolerance = (1e-3 if model.dtype == torch.float32 else 0.05) * alone.std().item()
    return torch.allclose(alone, padded, rtol=0, atol=tolerance)


def _other_state(model: PreTrainedModel) -> InputError:
    return InputError(
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
    alike: Sequence[Hashable] | None = None,
    n_largest: int | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the token that ended it.

    prompts: token ids of each row; padded on the left.
    choose: (logits (rows, tokens), row indices (rows,), step) -> chosen columns (rows,). The logits
        are those of the vocabulary, or of a part of it, see n_largest, and valid until the next step.
    ends: tokens that end a row.
    rows_change: told the indices of the rows in the batch, (rows,), whenever they change; for hooks
        that treat rows apart.
    alike: a key for each row. Rows with equal keys have the same prompt, and hooks treat them alike, so that
        their prompt passes through the model once.
    n_largest: how many of a row's largest logits `choose` reads, so that others may be left out; None
        means all.
    Raises InputError for a model with a state that is neither in the cache nor in the tokens.
    """
    first, copies = _distinct(range(len(prompts)) if alike is None else alike)
    rows = torch.arange(len(prompts), device=model.device)
    batch = _Batch(model, [prompts[row] for row in first], pad_id, max_new_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()

    def tell_rows(rows: Tensor) -> None:
        if rows_change is not None:
            rows_change(rows)

    with narrowed_head(model, lambda hidden: hidden[:, -1:]) as head:
        if len(first) < len(rows):
            tell_rows(rows[first])
        logits = batch.read_prompts()
        is_long = len(rows) * (max_new_tokens - 1) >= SCREENED_ROW_STEPS
        if head is not None and n_largest is not None and is_long:
            head.screen(n_largest, logits[0])
        if len(first) < len(rows):
            copied = torch.tensor(copies, device=model.device)
            logits = logits[copied]
            batch.take(copied)
            tell_rows(rows)
        for step in range(max_new_tokens):
            chosen = choose(logits, rows, step).to(model.device)
            if head is not None and head.tokens is not None:
                chosen = head.tokens[chosen]
            for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
                if token in ends:
                    ended.add(row)
                elif row not in ended:
                    new[row].append(token)
            if step + 1 == max_new_tokens or len(ended) == len(prompts):
                break
            is_left = torch.tensor([row not in ended for row in rows.tolist()], device=model.device)
            if (~is_left).sum() * DROP_FRACTION >= len(rows):
                kept = is_left.nonzero()[:, 0]
                rows, chosen = rows[kept], chosen[kept]
                batch.take(kept)
                tell_rows(rows)
            logits = batch.read(chosen)
    return new


class _Batch:
    """Rows that pass through the model together, and what it remembers of them."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, max_new_tokens: int
    ) -> None:
        self.model = model
        self.prompts, self.mask = pad_tokens(prompts, pad_id, "left", model.device)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.cache = _roomy_cache(model, self.mask.shape[1] + max_new_tokens)

    def read_prompts(self) -> Tensor:
        """Return the logits behind each prompt, (rows, vocabulary)."""
        logits = self._pass(self.prompts)
        for layer in self.cache.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
                if all(state is None for state in states):
                    raise _other_state(self.model)  # on the model, where rows cannot be copied or dropped
        return logits

    def read(self, chosen: Tensor) -> Tensor:
        """Return the logits behind each row's new token, chosen (rows,)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(chosen), 1)], dim=1)
        return self._pass(chosen[:, None])

    def take(self, rows: Tensor) -> None:
        """Go on with these rows, (n,) int64, where one may stand several times."""
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows)

    def _pass(self, tokens: Tensor) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        options = {"position_ids": positions} if self.takes_positions else {}
        output = self.model(
            input_ids=tokens,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )
        return output.logits[:, -1]


class _RoomyLayer(DynamicLayer):
    """Keys and values in memory for all steps, where a step adds its own and copies nothing else."""

    def __init__(self, room: int, is_sliding: bool) -> None:
        """room: positions, no more than a sliding window has."""
        super().__init__()
        self.room = room
        self.is_sliding = is_sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.all_keys, self.all_values = (
            states.new_empty(*states.shape[:2], self.room, states.shape[3])
            for states in (key_states, value_states)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the states (rows, heads, positions, d_head) of new positions; return those of all."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = start + key_states.shape[2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put these rows in the place of all."""
        if self.get_seq_length():
            kept = [states[beam_idx.to(states.device)] for states in (self.keys, self.values)]
            self.is_initialized = False
            self.update(*kept)


def _roomy_cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """Return the model's cache, with memory for all positions in layers that will forget none."""
    config = model.config.get_text_config(decoder=True)
    if config.num_hidden_layers != n_layers(model):
        return DynamicCache()  # which grows as the blocks ask; it cannot tell how many there are
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        is_short = type(layer) is DynamicSlidingWindowLayer and room <= layer.sliding_window
        if type(layer) is DynamicLayer or is_short:
            cache.layers[index] = _RoomyLayer(room, layer.is_sliding)
    return cache


def _distinct(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Return the first index of each distinct key, and for each key its index among these."""
    index_of: dict[Hashable, int] = {}
    first = []
    for index, key in enumerate(keys):
        if index_of.setdefault(key, len(first)) == len(first):
            first.append(index)
    return first, [index_of[key] for key in keys]


def main() -> None:
    """Check on a tiny model that decoding without cache gives the same tokens."""
    from support.tiny_models import tiny_model

    model, prompt = tiny_model(), [256, 5, 6, 7]
    (new,) = decode(model, [prompt], lambda logits, rows, step: logits.argmax(-1), 5)
    tokens = torch.tensor([prompt])
    for _ in range(5):
        with torch.inference_mode():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert tokens[0, len(prompt) :].tolist() == new
    print("loop OK: cached decoding equals whole passes")


if __name__ == "__main__":
    main()
