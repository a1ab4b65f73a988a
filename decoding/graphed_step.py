"""Repeat a decoding step as a CUDA graph, which the host launches as one piece of work (phase 4).

What changes from step to step lies in tensors that keep their place and are written there: tokens, mask,
positions, keys and values, and their number. Hooks run while the graph is recorded, and what they add is part
of it, so that a graph serves one batch of rows. The first step of a batch is computed as usual, which also
loads the kernels, the second one is recorded, and the others repeat it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decoding.key_value_cache import Cache, PreallocatedLayer
from support.errors import InputError

# Other rows need another graph. By estimate its recording takes as long as five steps that repeat it.
GRAPHED_DROP_FRACTION = 2


def graph_error(problem: str) -> InputError:
    """Return the error of a model whose steps cannot be graphs."""
    return InputError(f"{problem}; set cuda_graphs to false")


def check_place(model: nn.Module) -> None:
    """Raise InputError for a model that is not on one GPU as a whole."""
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(places) > 1 or not places[0].startswith("cuda"):
        raise graph_error(f"cuda_graphs needs all of a model on one GPU, not on {' and '.join(places)}")


class GraphedStep:
    """The rows of a batch behind their prompts."""

    def __init__(self, model: PreTrainedModel, cache: Cache, mask: Tensor, takes_positions: bool) -> None:
        """cache: with memory for all positions in every layer, which is taken over; mask: (rows, positions).

        Raises InputError for a cache that keeps anything else than keys and values of all positions.
        """
        if not all(isinstance(layer, PreallocatedLayer) for layer in cache.layers):
            raise graph_error(f"{type(model).__name__} keeps other states than keys and values")
        self.model, self.cache, self.takes_positions = model, cache, takes_positions
        self.length = mask.new_full((1,), mask.shape[1])
        self.positions = mask.sum(1, keepdim=True) - 1
        self.tokens = torch.zeros_like(self.positions)
        self.mask = nn.functional.pad(mask, (0, cache.layers[0].capacity - mask.shape[1]))
        cache.layers = [layer.static(self.length) for layer in cache.layers]
        cache.is_compileable = True  # so that transformers makes the mask of a step unread
        self._forget()

    def _forget(self) -> None:
        self.graph, self.logits, self.has_run = None, None, False

    def step(self, chosen: Tensor) -> Tensor:
        """Return the logits behind each row's new token, chosen (rows,); valid until the next step."""
        self.tokens.copy_(chosen[:, None].clamp(min=0))
        if not self.has_run:
            self.has_run = True
            return self._pass()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.tokens.device), torch.cuda.graph(self.graph):
                self.logits = self._pass()
        self.graph.replay()
        return self.logits

    def take(self, rows: Sequence[int]) -> Tensor:
        """Continue with these rows; return them on the device."""
        self._forget()
        index = torch.tensor(rows, device=self.mask.device)
        self.mask, self.positions, self.tokens = (
            values[index] for values in (self.mask, self.positions, self.tokens)
        )
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        return index

    def _pass(self) -> Tensor:
        self.mask.index_fill_(1, self.length, 1)
        self.length += 1
        self.positions += 1
        options = {"position_ids": self.positions} if self.takes_positions else {}
        return self.model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        ).logits[:, -1]
