"""Results come back in input order, whatever the batch size and however often memory runs out."""

import re

import pytest
import torch
from torch import nn

from decoding.batching import length_sorted_batches, run_in_batches

LENGTHS = [3, 9, 1, 9, 4, 7, 2, 8, 5, 6, 1]


def square_at_most(limit, seen):
    """A worker that runs out of memory above `limit` items and notes the sizes that it is given."""

    def run(indices):
        seen.append(len(indices))
        if len(indices) > limit:
            raise MemoryError
        return [index**2 for index in indices]

    return run


@pytest.mark.parametrize("batch_size", [1, 3, 11, 100])
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_results_are_in_input_order(batch_size, limit):
    for lengths in (LENGTHS, []):
        results = run_in_batches(square_at_most(limit, []), lengths, batch_size, "check", nn.Module())
        assert results == [index**2 for index in range(len(lengths))]


@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_batches_hold_every_item_once_and_the_longest_first(batch_size):
    batches = length_sorted_batches(LENGTHS, batch_size)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(LENGTHS)))
    assert [LENGTHS[index] for index in order] == sorted(LENGTHS, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@pytest.mark.parametrize(("limit", "expected"), [(8, []), (5, [4]), (2, [4, 2]), (1, [4, 2, 1])])
def test_each_smaller_batch_size_is_announced_and_kept_for_the_rest(limit, expected, caplog):
    seen = []
    run_in_batches(square_at_most(limit, seen), [1] * 16, 8, "check", nn.Module())
    *failed, fits = [8, *expected]
    assert [int(record.getMessage().split()[-1]) for record in caplog.records] == expected
    assert seen == [*failed, *[fits] * (16 // fits)]


def test_what_fits_is_remembered_for_the_model_and_what_it_does():
    model, seen = nn.Module(), []
    for of_model, desc in ((model, "check"), (model, "check"), (model, "other"), (nn.Module(), "check")):
        run_in_batches(square_at_most(3, seen), [1] * 4, 4, desc, of_model)
    assert seen == [4, 2, 2, *[2, 2], *[4, 2, 2] * 2]


@pytest.mark.parametrize(
    ("run", "batch_size", "message"),
    [(lambda indices: indices[1:], 4, "shorter"), (list, 0, "batch_size is 0")],
)
def test_a_lost_result_and_a_batch_size_below_1_are_rejected(run, batch_size, message):
    with pytest.raises(ValueError, match=message):
        run_in_batches(run, LENGTHS, batch_size, "check", nn.Module())


@pytest.mark.parametrize(
    ("error", "is_retried"),
    [
        (MemoryError("no more"), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True),
        (RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("HIP error: hipErrorOutOfMemory: out of memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("XLA: RESOURCE_EXHAUSTED: failed to allocate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_only_failed_allocations_halve_the_batch_and_other_errors_are_raised_at_once(error, is_retried):
    seen = []

    def run(indices):
        seen.append(len(indices))
        raise error

    with pytest.raises(type(error), match=re.escape(str(error))):
        run_in_batches(run, LENGTHS, 4, "check", nn.Module())
    assert seen == ([4, 2, 1] if is_retried else [4])


def test_a_real_failed_allocation_halves_the_batch():
    def run(indices):
        if len(indices) > 1:
            torch.empty(2**60, dtype=torch.uint8)
        return indices

    assert run_in_batches(run, LENGTHS, 4, "check", nn.Module()) == list(range(len(LENGTHS)))
