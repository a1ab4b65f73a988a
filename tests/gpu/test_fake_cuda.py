"""The fake devices reject what CUDA rejects, allow what it allows, and count what makes the host wait."""

import pytest
import torch
from fake_cuda import fake_cuda

REJECTED = {
    "two devices": lambda on_0, on_1: on_0 @ on_1.T,
    "host and device": lambda on_0, on_1: on_0 + torch.ones(4),
    "host tensor, device index": lambda on_0, on_1: torch.ones(3)[on_0.long()[0]],
    "index of another device": lambda on_0, on_1: on_0[on_1.long()[0]],
    "cat": lambda on_0, on_1: torch.cat([on_0, torch.ones(1, 4)]),
    "index_copy": lambda on_0, on_1: on_0.index_copy(0, torch.arange(3), on_0),
    "numpy": lambda on_0, on_1: on_0.numpy(),
    "generator": lambda on_0, on_1: torch.rand(3, device="cuda", generator=torch.Generator()),
    "no such device": lambda on_0, on_1: torch.ones(1, device="cuda:2"),
    "not there": lambda on_0, on_1: on_0.to("cuda:2"),
}


@pytest.mark.parametrize("wrong", REJECTED.values(), ids=REJECTED)
def test_what_cuda_rejects_is_rejected(wrong):
    with fake_cuda(2):
        tensors = torch.ones(3, 4, device="cuda"), torch.ones(3, 4, device="cuda:1")
        with pytest.raises((RuntimeError, TypeError), match=r"device|numpy|generator"):
            wrong(*tensors)


# What is done to an array of 3 x 4 ones -> the kinds of waits.
COUNTED = {
    "a scalar of the host": (lambda x: x * torch.tensor(2.0), []),
    "arithmetic": (lambda x: (x @ x.T).cumsum(1).softmax(-1), []),
    "views": (lambda x: x[1:, None].transpose(0, 1), []),
    "an index on the device": (lambda x: x[torch.zeros(2, dtype=torch.long, device="cuda")], []),
    "an index on the host": (lambda x: x[torch.tensor([0, 1])], ["host to device"]),
    "a list": (lambda x: x[[0, 1]], ["host to device"]),
    "a mask": (lambda x: x[x > 0], ["size"]),
    "nonzero": (lambda x: x.nonzero(), ["size"]),
    "item": (lambda x: x.sum().item(), ["value"]),
    "bool": (lambda x: bool(x.all()), ["value"]),
    "tolist": (lambda x: x.tolist(), ["device to host"]),
    "cpu": (lambda x: x.cpu(), ["device to host"]),
    "a new tensor": (lambda x: torch.tensor([1.0], device="cuda"), ["host to device"]),
    "a copy": (lambda x: torch.ones(3, 4).to(x.device), ["host to device"]),
    "between devices": (lambda x: x.to("cuda:1"), []),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_makes_the_host_wait_is_counted_with_its_line(name):
    work, expected = COUNTED[name]
    with fake_cuda(2) as device:
        x = torch.ones(3, 4, device="cuda")
        device.reset()
        work(x)
    assert [kind for kind, _ in device.waits.elements()] == expected
    assert all(place.startswith("tests/gpu/test_fake_cuda.py:") for _, place in device.waits)
    assert device.n_waits() == len(expected)


def test_values_are_computed_in_place_too_and_devices_end_with_the_body():
    with fake_cuda() as device:
        x = torch.ones(3, 4, device="cuda")
        x += 1
        x[0] = 5
        x[1, :2].fill_(0)
        assert x.device == torch.device("cuda:0")
        assert x.cpu().tolist() == [[5] * 4, [0, 0, 2, 2], [2] * 4]
        assert torch.cuda.is_available()
        device.reset()
        (x.T @ x).view(-1)
        assert device.n_launches == 1
    assert not torch.cuda.is_available()
