"""Run work over many texts in batches of similar length, halving a batch that does not fit.

Shared by extraction, generation and evaluation. Results come back in the order of the input. How many rows
fitted when memory had run out is remembered for each model and use of it.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from support.errors import InputError
from support.progress import Bar

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


# What libraries say of an allocation that failed, in a RuntimeError that is no OutOfMemoryError, case aside.
# cuBLAS and cuDNN that find no room for their handles are "not initialized".
FAILED_ALLOCATIONS = (
    "allocate memory",
    "out of memory",
    "out_of_memory",
    "not enough memory",
    "insufficient memory",
    "alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_not_initialized",
    "resource_exhausted",
)
# model -> what is done in batches -> rows that fitted, once memory had run out
_fitting: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that an allocation failed, on the CPU or an accelerator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in FAILED_ALLOCATIONS
    )


def length_sorted_batches(
    lengths: Sequence[int], batch_size: int, equal_lengths: bool = False
) -> list[list[int]]:
    """Return batches of indices, longest first: little padding, and short memory is known at once.

    equal_lengths: items of different lengths never share a batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups = [list(group) for _, group in groupby(order, lengths.__getitem__)] if equal_lengths else [order]
    return [
        group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)
    ]


def run_in_batches(
    run: Callable[[list[int]], Sequence[Result]],
    lengths: Sequence[int],
    batch_size: int,
    desc: str,
    model: nn.Module,
    quiet: bool = False,
    equal_lengths: bool = False,
) -> list[Result]:
    """Return `run`'s result for every item, in input order.

    run: takes item indices, returns one result for each.
    lengths, equal_lengths: see `length_sorted_batches`. quiet: show no progress.
    desc, model: what is done, with which model. When memory runs out, the batch size is halved for the rest
        and for all later calls with the same; a single item that does not fit raises the original error.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected 1 or more")
    fitting = _fitting.setdefault(model, {})
    batch_size = min(batch_size, fitting.get(desc, batch_size))
    results: dict[int, Result] = {}
    # A bar for one batch says nothing, and a caller with a bar of its own wants no other.
    quiet = quiet or len(lengths) <= batch_size
    pending = length_sorted_batches(lengths, batch_size, equal_lengths)[::-1]
    with Bar(len(lengths), desc, "text", leave=False, quiet=quiet) as progress:
        while pending:
            indices = pending.pop()
            if len(indices) > batch_size:
                pending.append(indices[batch_size:])
                indices = indices[:batch_size]
            values = _run_unless_out_of_memory(run, indices)
            if values is None:
                batch_size = fitting[desc] = max(1, len(indices) // 2)
                logger.warning("%s: out of memory, batch size is now %d", desc, batch_size)
                pending.append(indices)
                continue
            results.update(zip(indices, values, strict=True))
            progress.update(len(indices))
    return [results[index] for index in range(len(lengths))]


def _run_unless_out_of_memory(
    run: Callable[[list[int]], Sequence[Result]], indices: list[int]
) -> Sequence[Result] | None:
    """Return the results, or None when memory ran out for more than one item.

    The exception ends with this function, and with it the tensors that its traceback holds.
    """
    try:
        return run(indices)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(indices) == 1:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
