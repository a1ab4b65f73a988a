"""Keep keys and values in memory that is there for all positions from the start (phase 4)."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from model_loading import n_layers

MULTIPLE = 8  # of positions: kernels want a mask whose rows are that aligned


class Cache(DynamicCache):
    """A cache of which can be said whether it can be compiled."""

    is_compileable = False  # a property of all layers otherwise, which an instance cannot set


class PreallocatedLayer(DynamicLayer):
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

    def static(self, length: Tensor) -> StaticLayer:
        """Return a layer that takes this one's memory over and attends to all of it, as its mask says.

        length: (1,), the number of positions that are written.
        """
        n = self.get_seq_length()
        for states in (self.all_keys, self.all_values):
            states[:, :, n:] = 0  # what a mask hides is multiplied by 0, and must be finite
        layer = StaticLayer(self.capacity)
        layer.keys, layer.values, layer.device = self.all_keys, self.all_values, self.all_keys.device
        layer.cumulative_length, layer.is_sliding, layer.is_initialized = (
            length.clone(),
            self.is_sliding,
            True,
        )
        return layer


def preallocated_cache(model: PreTrainedModel, capacity: int, for_graph: bool = False) -> Cache:
    """Return the model's cache, preallocated in the layers that keep all `capacity` positions.

    for_graph: capacity is rounded up, and layers with a sliding window keep all positions too, of which their
        mask hides those before the window.
    """
    config = model.config.get_text_config(decoder=True)
    if config.num_hidden_layers != n_layers(model):
        return Cache()  # grows as the blocks ask: the configuration does not tell how many there are
    cache = Cache(config=model.config)
    if for_graph:
        capacity = -(-capacity // MULTIPLE) * MULTIPLE
    for index, layer in enumerate(cache.layers):
        is_whole = type(layer) is DynamicSlidingWindowLayer and (
            for_graph or capacity <= layer.sliding_window
        )
        if type(layer) is DynamicLayer or is_whole:
            cache.layers[index] = PreallocatedLayer(capacity, layer.is_sliding)
    return cache
