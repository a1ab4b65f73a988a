"""Compute what a batch takes in an accelerator's memory, and how many rows fit there.

Numbers are bounds from a model's configuration: nothing is run, and weights need not be there.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

MOST_ROWS = 480  # of a decoding step: from here on a card computes as long as the host launches, at 7B
MOST_TEXTS = 64  # of a pass over whole texts, which keeps a card busy with fewer
MEMORY_SHARE = 0.8  # of what is free; scorers, workspaces and fragments have the rest
# Numbers that are in memory together: of a token as many widths of the residual stream (a gated layer has 16,
# attention 8, blocks that are read 9), of a predicted token as many vocabularies.
STATES, LOGITS = 32, 4
EVEN = 16  # rows are a multiple of it, so that halved batches hold the rows of whole ones


class LongestRow(NamedTuple):
    """Tokens of a batch's longest row: those that pass at once, that are predicted, and that are cached."""

    read: int
    predicted: int = 0
    cached: int = 0


def cache_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of a token's keys and values in all blocks; grouped heads share them."""
    text = config.get_text_config(decoder=True)
    names = ("num_key_value_heads", "num_kv_heads", "num_attention_heads")
    heads = next(filter(None, (getattr(text, name, None) for name in names)))
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * dtype.itemsize


def row_bytes(config: PreTrainedConfig, dtype: torch.dtype, longest: LongestRow) -> int:
    """Return the bytes that a row takes at most beside the weights, on one device that has all blocks."""
    text = config.get_text_config(decoder=True)
    numbers = longest.read * STATES * text.hidden_size + longest.predicted * LOGITS * text.vocab_size
    return numbers * dtype.itemsize + longest.cached * cache_bytes(config, dtype)


def rows_that_fit(
    model: PreTrainedModel, blocks: Sequence[nn.Module], longest: LongestRow, most: int
) -> int | None:
    """Return how many rows of a batch fit into the free memory of a model's CUDA devices, at most `most`.

    The device with the least room decides; its share of the cache is that of the blocks on it. None for a
    model that is on no such device.
    """
    if model.device.type != "cuda":
        return None
    head = _device(model.get_output_embeddings(), model.device)
    rows = most
    for device, n in Counter([head, *(_device(block, model.device) for block in blocks)]).items():
        cached = longest.cached * (n - (device == head)) // len(blocks)
        here = longest._replace(cached=cached, predicted=longest.predicted * (device == head))
        rows = min(rows, int(MEMORY_SHARE * _free_bytes(device) / row_bytes(model.config, model.dtype, here)))
    return max(1, rows - rows % EVEN if rows > EVEN else rows)


def _device(module: nn.Module | None, default: torch.device) -> torch.device:
    """Return the CUDA device that a module computes on; offloaded weights are fetched to `default`."""
    found = default if module is None else next(module.parameters()).device
    return found if found.type == "cuda" else default


def _free_bytes(device: torch.device) -> int:
    """Return what the device has free, with what torch holds there and does not use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
