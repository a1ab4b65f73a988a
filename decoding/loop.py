"""Decode a batch of prompts token by token with a key-value cache (phase 4).

The loop of `model.generate` copies and searches all logits several times a step, which takes as long as
the model itself when the vocabulary is large. This one computes the logits of the last position alone.
Equal rows share the pass over their prompt, and rows leave the batch once an eighth of them has ended.
"""

import inspect
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from decoding.output_head import narrowed_head
from model_loading import evaluation_mode, n_layers, pad_tokens
from support.errors import InputError

# Dropping rows copies the cache, which takes about a fifteenth of a step.
DROP_FRACTION = 8


@torch.inference_mode()
def hides_left_padding(model: PreTrainedModel, pad_id: int) -> bool:
    """Tell whether masked padding on its left leaves a prompt's logits alone; Bart's decoder counts it.

    Raises InputError for a model that does not take a key-value cache.
    """
    if not _takes(model, "past_key_values"):
        raise _state_error(model)
    if _takes(model, "position_ids"):
        return True
    with evaluation_mode(model):
        alone = _Batch(model, [[5, 6, 7]], pad_id, 1).prefill()[0].float()
        padded = _Batch(model, [[5, 6, 7], [8, 9, 5, 6, 7]], pad_id, 1).prefill()[0].float()
    tolerance = (1e-3 if model.dtype == torch.float32 else 0.05) * alone.std().item()
    return torch.allclose(alone, padded, rtol=0, atol=tolerance)


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _state_error(model: PreTrainedModel) -> InputError:
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
    on_rows_change: Callable[[Tensor], None] = lambda rows: None,
    row_keys: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the token that ended it.

    prompts: token ids of each row; padded on the left.
    choose: (logits (rows, vocabulary), row indices (rows,), step) -> chosen tokens (rows,). The logits
        are valid until the next step.
    ends: tokens that end a row.
    on_rows_change: called with the indices of the rows in the batch, (rows,), whenever they change.
    row_keys: rows with equal keys have the same prompt, which passes through the model once, and are
        treated equally by hooks.
    Raises InputError for a model with a state that is neither in the cache nor in the tokens.
    """
    keys = range(len(prompts)) if row_keys is None else row_keys
    place = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    copies = [place[key] for key in keys]
    distinct = [copies.index(index) for index in range(len(place))]
    rows = torch.arange(len(prompts), device=model.device)
    batch = _Batch(model, [prompts[row] for row in distinct], pad_id, max_new_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()
    with evaluation_mode(model), narrowed_head(model, lambda hidden: hidden[:, -1:]):
        if is_shared := len(distinct) < len(rows):
            on_rows_change(rows[distinct])
        logits = batch.prefill()
        if is_shared:
            logits = logits[copies]
            batch.take(torch.tensor(copies, device=model.device))
            on_rows_change(rows)
        for step in range(max_new_tokens):
            chosen = choose(logits, rows, step).to(model.device)
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
                on_rows_change(rows)
            logits = batch.step(chosen)
    return new


class _Batch:
    """Rows that pass through the model together, with their attention mask and cache."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, max_new_tokens: int
    ) -> None:
        self.model = model
        self.prompts, self.mask = pad_tokens(prompts, pad_id, "left", model.device)
        self.takes_positions = _takes(model, "position_ids")
        self.cache = _preallocated_cache(model, self.mask.shape[1] + max_new_tokens)

    def prefill(self) -> Tensor:
        """Return the logits behind each prompt, (rows, vocabulary)."""
        logits = self._pass(self.prompts)
        for layer in self.cache.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                states = (*layer.conv_states.values(), *layer.recurrent_states.values())
                if all(state is None for state in states):
                    raise _state_error(self.model)  # on the model, where rows cannot be copied or dropped
        return logits

    def step(self, chosen: Tensor) -> Tensor:
        """Return the logits behind each row's new token, chosen (rows,)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(chosen), 1)], dim=1)
        return self._pass(chosen[:, None])

    def take(self, rows: Tensor) -> None:
        """Continue with these rows, (n,) int64; an index may occur several times."""
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows)

    def _pass(self, tokens: Tensor) -> Tensor:
        options = {"attention_mask": self.mask, "past_key_values": self.cache, "use_cache": True}
        if self.takes_positions:
            options["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self.model(input_ids=tokens, **options).logits[:, -1]


class _PreallocatedLayer(DynamicLayer):
    """Keys and values in memory for all positions; a step writes its own and copies no others."""

    def __init__(self, capacity: int, is_sliding: bool) -> None:
        super().__init__()
        self.capacity, self.is_sliding = capacity, is_sliding

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the states (rows, heads, positions, d_head) of new positions; return those of all."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.all_keys, self.all_values = (
                states.new_empty(*states.shape[:2], self.capacity, states.shape[3])
                for states in (key_states, value_states)
            )
        end = start + key_states.shape[2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace all rows by these."""
        if self.get_seq_length():
            kept = [states[beam_idx.to(states.device)] for states in (self.keys, self.values)]
            self.is_initialized = False
            self.update(*kept)


def _preallocated_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """Return the model's cache, preallocated in the layers that keep all `capacity` positions."""
    config = model.config.get_text_config(decoder=True)
    if config.num_hidden_layers != n_layers(model):
        return DynamicCache()  # grows as the blocks ask: the configuration does not tell how many there are
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        is_short = type(layer) is DynamicSlidingWindowLayer and capacity <= layer.sliding_window
        if type(layer) is DynamicLayer or is_short:
            cache.layers[index] = _PreallocatedLayer(capacity, layer.is_sliding)
    return cache
