"""Decode a batch of prompts token by token with a key-value cache (phase 4).

The loop of `model.generate` copies and searches all logits several times a step, which takes as long as
the model itself when the vocabulary is large. This one computes the logits of the last position alone.
Equal rows share the pass over their prompt, and rows leave the batch once an eighth of them has ended.

The host launches an accelerator's work ahead of it, and stands still whenever it reads a value from there.
So tokens stay on the device and are read together every few steps; rows that have ended meanwhile write
tokens that are thrown away.
"""

import inspect
from collections.abc import Callable, Collection, Hashable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from decoding.batching import is_out_of_memory
from decoding.graphed_step import GRAPHED_DROP_FRACTION, GraphedStep, check_place, graph_error
from decoding.key_value_cache import preallocated_cache
from decoding.output_head import narrowed_head
from decoding.row_sampler import NOT_FINITE
from model_loading import evaluation_mode, pad_tokens
from support.errors import InputError, first_line

# Dropping rows copies the cache, which takes about a fifteenth of a step.
DROP_FRACTION = 8
STEPS_BETWEEN_READS = 8  # on an accelerator; the CPU's tokens are read at every step, which costs nothing
CHECKED_STEPS = 5  # the prompts', a first, one that is recorded, and two that repeat it


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
    return torch.allclose(alone, padded, rtol=0, atol=_tolerance(alone, model))


def check_cuda_graphs(model: PreTrainedModel, pad_id: int) -> None:
    """Raise InputError where a step of the model cannot be a CUDA graph, or gives other logits as one."""
    check_place(model)

    def logits(cuda_graphs: bool) -> Tensor:
        steps = []

        def choose(of_step: Tensor, rows: Tensor, step: int) -> Tensor:
            steps.append(of_step.float().clone())  # its memory is the next step's
            return rows + step

        decode(
            model, [[5, 6, 7], [8, 9, 5, 6, 7]], choose, CHECKED_STEPS, (), pad_id, cuda_graphs=cuda_graphs
        )
        return torch.stack(steps)

    expected = logits(False)
    try:
        found = logits(True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise graph_error(
            f"a step of {type(model).__name__} cannot be recorded ({first_line(error)})"
        ) from error
    if not torch.allclose(found, expected, rtol=0, atol=_tolerance(expected, model)):
        raise graph_error(
            f"a step of {type(model).__name__} gives other logits when it is repeated as a graph"
        )


def _tolerance(logits: Tensor, model: PreTrainedModel) -> float:
    """Return how far logits of the same rows in batches of another shape may differ."""
    return (1e-3 if model.dtype == torch.float32 else 0.05) * logits.std().item()


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
    cuda_graphs: bool = False,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the token that ended it.

    prompts: token ids of each row; padded on the left.
    choose: (logits (rows, vocabulary), row indices (rows,), step) -> chosen tokens (rows,), NOT_FINITE where
        there is none to choose. The logits are valid until the next step.
    ends: tokens that end a row.
    on_rows_change: called with the indices of the rows in the batch, (rows,), whenever they change.
    row_keys: rows with equal keys have the same prompt, which passes through the model once, and are
        treated equally by hooks.
    cuda_graphs: repeat a step as a CUDA graph; see `graphed_step`.
    Raises InputError for logits that are not finite, and for a model with a state that is neither in the
    cache nor in the tokens.
    """
    keys = range(len(prompts)) if row_keys is None else row_keys
    place = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    copies = [place[key] for key in keys]
    distinct = [copies.index(index) for index in range(len(place))]
    rows = torch.arange(len(prompts), device=model.device)
    batch = _Batch(model, [prompts[row] for row in distinct], pad_id, max_new_tokens, cuda_graphs)
    written = _Written(len(prompts), ends)
    n_between = 1 if model.device.type == "cpu" else STEPS_BETWEEN_READS
    with evaluation_mode(model), narrowed_head(model, lambda hidden: hidden[:, -1:]):
        if is_shared := len(distinct) < len(rows):
            on_rows_change(rows[distinct])
        logits = batch.prefill()
        if is_shared:
            logits = logits[batch.take(copies)]
            on_rows_change(rows)
        if cuda_graphs:
            batch = GraphedStep(model, batch.cache, batch.mask, batch.takes_positions)
        drop_fraction = GRAPHED_DROP_FRACTION if cuda_graphs else DROP_FRACTION
        unread = []
        for step in range(max_new_tokens):
            chosen = choose(logits, rows, step).to(model.device)
            unread.append(chosen)
            is_last = step + 1 == max_new_tokens
            if is_last or len(unread) == n_between:
                left = written.read(unread)
                unread = []
                if is_last or not left:
                    break
                if (len(rows) - len(left)) * drop_fraction >= len(rows):
                    kept = batch.take(left)
                    rows, chosen = rows[kept], chosen[kept]
                    written.keep(left)
                    on_rows_change(rows)
            logits = batch.step(chosen)
    return written.tokens


class _Written:
    """The new tokens of all rows, as far as they are read, and the rows that are in the batch."""

    def __init__(self, n_rows: int, ends: Collection[int]) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n_rows)]
        self.in_batch, self.ends, self.ended = list(range(n_rows)), ends, set()

    def read(self, steps: Sequence[Tensor]) -> list[int]:
        """Take the tokens (rows,) of each step. Return the places in the batch of rows that go on."""
        for row, tokens in zip(self.in_batch, torch.stack(list(steps), dim=1).tolist(), strict=True):
            for token in tokens:
                if row in self.ended:
                    break
                if token == NOT_FINITE:
                    raise InputError("the logits are not finite; lower alpha, or use bfloat16 or float32")
                if token in self.ends:
                    self.ended.add(row)
                else:
                    self.tokens[row].append(token)
        return [place for place, row in enumerate(self.in_batch) if row not in self.ended]

    def keep(self, places: Sequence[int]) -> None:
        """Continue with the rows at these places of the batch."""
        self.in_batch = [self.in_batch[place] for place in places]


class _Batch:
    """Rows that pass through the model together, with their attention mask and cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        max_new_tokens: int,
        for_graph: bool = False,
    ) -> None:
        """for_graph: see `preallocated_cache`."""
        self.model = model
        self.prompts, self.mask = pad_tokens(prompts, pad_id, "left", model.device)
        self.is_padded = [len(prompt) < self.mask.shape[1] for prompt in prompts]
        self.takes_positions = _takes(model, "position_ids")
        self.cache = preallocated_cache(model, self.mask.shape[1] + max_new_tokens, for_graph)

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
        # A row without a token goes on with any, until that is read.
        return self._pass(chosen[:, None].clamp(min=0))

    def take(self, rows: Sequence[int]) -> Tensor:
        """Continue with these rows, of which one may occur several times; return them on the device."""
        self.is_padded = [self.is_padded[row] for row in rows]
        index = torch.tensor(rows, device=self.model.device)
        self.mask = self.mask[index]
        self.cache.reorder_cache(index)
        return index

    def _pass(self, tokens: Tensor) -> Tensor:
        # transformers reads from a mask whether it hides anything. It need not: without padding it gets none,
        # and with a cache that can be compiled it makes the mask of a step unread.
        self.cache.is_compileable = any(self.is_padded)
        mask = self.mask if any(self.is_padded) else None
        options = {"attention_mask": mask, "past_key_values": self.cache, "use_cache": True}
        if self.takes_positions:
            options["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self.model(input_ids=tokens, **options).logits[:, -1]
