"""CUDA devices that are not there, to find device mismatches and host waits without a GPU.

Inside `fake_cuda()` a tensor "on cuda:1" is a CPU tensor in a wrapper that says it is on cuda:1. Every
operation is computed on the CPU, so values, control flow and texts are real, and every operation is checked
by CUDA's rules:

- Tensors of two devices in one operation raise what CUDA raises. A CPU scalar tensor, and CPU indices into a
  CUDA tensor, are allowed, as there.
- `.numpy()` of a CUDA tensor raises; so does a CPU generator for a CUDA tensor.
- What makes the host wait for the device is counted, with the line of the project that did it: `.item()`,
  `bool()`, `.tolist()`, `.cpu()`, copies from the host, boolean masks as indices, `nonzero`, `unique`.
- Operations that launch a kernel are counted; views are not.

    with fake_cuda(n_devices=2) as device:
        model = model.to("cuda:0")
        ...
        device.waits           # Counter of (kind, place)
        device.n_launches

A CUDA graph records operations, which its replay computes anew from what their tensors hold by then, into the
same tensors. As there, recording one computes nothing that lasts, and what waits meanwhile raises.

It cannot show what real kernels do (dtypes that they lack, their rounding, their memory), streams or races.
"""

import os
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

ROOT = f"{Path(__file__).parents[2]}/"
aten = torch.ops.aten

# Operations whose result has a size that only the device knows, or is a value for the host.
VALUES = set("_local_scalar_dense equal is_nonzero item".split())
SIZES = set(
    "nonzero nonzero_numpy argwhere masked_select _unique2 unique_dim unique_consecutive bincount "
    "repeat_interleave".split()
)
INDEXING = set("index index_put index_put_ _index_put_impl_ _unsafe_index".split())
# Operations in which a CPU scalar may stand beside CUDA tensors, though they are not tagged as pointwise.
SCALARS_ALLOWED = set(
    "where masked_fill masked_fill_ fill_ index_put_ _index_put_impl_ lerp clamp addr_ full_like "
    "linalg_vector_norm".split()
)
# Operations that launch no kernel.
VIEWS = set(
    "view _unsafe_view view_as expand expand_as permute transpose t select slice split split_with_sizes "
    "unsqueeze squeeze detach alias as_strided unbind unfold reshape chunk diagonal movedim flatten "
    "unflatten lift_fresh narrow matrix_H mT sym_size sym_stride sym_numel is_same_size dim size stride "
    "empty empty_like new_empty empty_strided resolve_conj resolve_neg _reshape_alias set_ real swapaxes "
    "adjoint tensor_split hsplit is_pinned broadcast_to".split()
)


class CudaTensor(torch.Tensor):
    """A CPU tensor, `inner`, that says it is on a CUDA device."""

    @staticmethod
    def __new__(cls, inner, device):
        # An ordinary tensor, also in inference mode: views of one must be of its kind.
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                layout=inner.layout,
                device=device,
                requires_grad=False,
            )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"CudaTensor({self.inner!r}, device={self.device})"

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self):
        _active[-1].wait("device to host")
        return self.inner.tolist()

    # A build without CUDA has no guard for its devices, which these would ask for in C++.
    def __invert__(self):
        return torch.bitwise_not(self)

    def copy_(self, source, non_blocking=False):
        return aten.copy_.default(self, source, non_blocking)

    def nonzero(self, as_tuple=False):
        found = aten.nonzero.default(self)
        return found.unbind(1) if as_tuple else found

    def contiguous(self, memory_format=torch.contiguous_format):
        is_so = self.inner.is_contiguous(memory_format=memory_format)
        return self if is_so else aten.clone.default(self, memory_format=memory_format)

    def __getitem__(self, index):
        return _active[-1].getitem(self, index)

    def __setitem__(self, index, value):
        _active[-1].setitem(self, index, value)

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), CudaTensor(self.inner.detach().clone(), self.device))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _active[-1].run(func, args, kwargs or {})


_active = []  # FakeCuda, the innermost last


def _is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def _inner(value):
    return value.inner if isinstance(value, CudaTensor) else value


class FakeCuda(TorchDispatchMode):
    """Runs, checks and counts operations; see the module."""

    def __init__(self, n_devices):
        super().__init__()
        self.n_devices = n_devices
        self.reset()

    def reset(self):
        """Count from 0 again."""
        self.n_launches, self.waits, self.graph = 0, Counter(), None

    def n_waits(self, kind=None):
        return sum(n for (what, _), n in self.waits.items() if kind in (None, what))

    def wait(self, kind):
        if self.graph is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing, at {_place()}")
        self.waits[kind, _place()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        name = func._schema.name.split("::")[-1]
        if name == "to":  # in inference mode, which does not take it apart
            return self._to(func, args, kwargs)
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        asked = kwargs.get("device")
        to_cuda = _is_cuda(asked)
        if not to_cuda and not any(isinstance(value, CudaTensor) for value in tensors):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if to_cuda and generator is not None and generator.device.type != "cuda":
            raise RuntimeError(f"Expected a 'cuda' generator but found '{generator.device.type}'")
        device = self._device_of_result(func, name, args, tensors, asked)
        self._count(name, args, asked)
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        if self.graph is not None and func._schema.is_mutable:
            self.graph.keep(tree_flatten((inner_args, inner_kwargs))[0])

        def compute():
            return self._compute(func, name, inner_args, inner_kwargs, to_cuda, asked)

        found = compute()
        if self.graph is not None and device.type == "cuda":
            self.graph.record(compute, found, () if func._schema.is_mutable else tensors)
        # Operations in place and with out= return the tensor that was given.
        given = {id(_inner(value)): value for value in tensors} if func._schema.is_mutable else {}

        def wrap(value):
            if not isinstance(value, torch.Tensor):
                return value
            is_new = id(value) not in given and device.type == "cuda"
            return CudaTensor(value, device) if is_new else given.get(id(value), value)

        return tree_map(wrap, found)

    @staticmethod
    def _compute(func, name, args, kwargs, to_cuda, asked):
        """Run on CPU tensors what was asked for on CUDA."""
        kwargs = {**kwargs, "device": torch.device("cpu")} if to_cuda else dict(kwargs)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if name == "histc" and not args[0].is_floating_point():  # CUDA can, and the CPU can't
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        if name == "_to_copy" and not kwargs.get("dtype") and asked is not None:
            # A copy between devices, which func would leave out.
            memory_format = kwargs.get("memory_format")
            plain = memory_format in (None, torch.preserve_format)
            return args[0].clone() if plain else args[0].clone(memory_format=memory_format)
        return func(*args, **kwargs)

    def _to(self, func, args, kwargs):
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        value, other = given["self"], given.get("other", given["self"])
        device, dtype = given.get("device") or other.device, given.get("dtype") or other.dtype
        device = self._existing(device) if _is_cuda(device) else torch.device(device)
        if device == value.device and dtype == value.dtype and not given.get("copy"):
            return CudaTensor(value.inner, value.device) if isinstance(value, CudaTensor) else value
        options = {"dtype": dtype} | ({"device": device} if device != value.device else {})
        return self.run(aten._to_copy.default, (value,), options)

    def _existing(self, device):
        device = torch.device("cuda", torch.device(device).index or 0)
        if device.index >= self.n_devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device}; there are {self.n_devices})")
        return device

    def _device_of_result(self, func, name, args, tensors, asked):
        """Raises what CUDA raises for tensors that are on several devices."""
        if asked is not None:
            return self._existing(asked) if _is_cuda(asked) else torch.device(asked)
        if name in ("copy_", "copy", "_to_copy"):  # these join devices by design
            return tensors[0].device
        if name in INDEXING:
            for index in args[1]:
                if index is not None:
                    self._check_index(args[0], index)
            tensors = [args[0], *(value for value in args[2:] if isinstance(value, torch.Tensor))]
        may_be_scalar = torch.Tag.pointwise in func.tags or name in SCALARS_ALLOWED
        devices = {
            value.device
            for value in tensors
            if isinstance(value, CudaTensor) or value.ndim or not may_be_scalar
        }
        if len(devices) > 1:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{', '.join(sorted(map(str, devices)))}! (when running {func}, at {_place()})"
            )
        return next(value.device for value in tensors if isinstance(value, CudaTensor))

    @staticmethod
    def _check_index(base, index):
        if index.device.type != "cpu" and index.device != base.device:
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor "
                f"({base.device}), got {index.device}, at {_place()}"
            )

    def _count(self, name, args, asked):
        if name in ("_to_copy", "copy_"):
            start, end = (args[0].device, asked) if name == "_to_copy" else (args[1].device, args[0].device)
            if end is not None and _is_cuda(start) != _is_cuda(end):
                return self.wait("device to host" if _is_cuda(start) else "host to device")
        if name in VALUES | SIZES:
            self.wait("value" if name in VALUES else "size")
        elif name in INDEXING:
            for index in args[1]:
                if index is not None:
                    self._count_index(index)
        self.n_launches += name not in VIEWS
        return None

    def _count_index(self, index):
        if index.device.type == "cpu":
            self.wait("host to device")
        if index.dtype in (torch.bool, torch.uint8):
            self.wait("size")

    def _own_index(self, base, index):
        """Return an index with CPU tensors, and whether it copies, as a view does not."""
        copies = False

        def own(value):
            nonlocal copies
            if isinstance(value, (list, range)):
                copies = True
                self.wait("host to device")
                return list(value)
            if isinstance(value, torch.Tensor):
                self._check_index(base, value)
                if value.ndim or value.dtype == torch.bool:
                    copies = True
                    self._count_index(value)
                else:
                    self.wait("value")  # a tensor of one number is read
            return _inner(value)

        return (tuple(map(own, index)) if isinstance(index, tuple) else own(index)), copies

    def getitem(self, base, index):
        index, copies = self._own_index(base, index)
        self.n_launches += copies
        with _disable_current_modes():
            found = base.inner[index]
        if self.graph is not None:
            self.graph.record(lambda: base.inner[index], found, [base])
        return CudaTensor(found, base.device)

    def setitem(self, base, index, value):
        index, _ = self._own_index(base, index)
        self.n_launches += 1
        if isinstance(value, torch.Tensor) and value.ndim and value.device != base.device:
            if value.device.type != "cpu":
                raise RuntimeError(f"setitem of {value.device} into {base.device}, at {_place()}")
            self.wait("host to device")

        def assign():
            base.inner[index] = _inner(value)
            return base.inner

        if self.graph is not None:
            self.graph.keep([base.inner])
            self.graph.record(assign, base.inner)
        with _disable_current_modes():
            assign()


class FakeGraph:
    """What CUDAGraph is, of operations on CPU tensors."""

    def __init__(self):
        self.steps, self.before = [], []

    def keep(self, values):
        """Remember what tensors hold that an operation is about to change."""
        self.before += [(value, value.clone()) for value in values if isinstance(value, torch.Tensor)]

    def record(self, compute, found, viewed=()):
        """Remember an operation, unless what it found are views, which see by themselves what changes."""
        found = [value for value in tree_flatten(found)[0] if isinstance(value, torch.Tensor)]
        memories = {_inner(value).untyped_storage().data_ptr() for value in viewed}
        if not any(value.untyped_storage().data_ptr() in memories for value in found):
            self.steps.append((compute, found))

    @contextmanager
    def recording(self):
        device = _active[-1]
        device.graph = self
        try:
            yield
        finally:
            device.graph = None
            with _disable_current_modes():
                for value, before in reversed(self.before):
                    value.copy_(before)

    def replay(self):
        _active[-1].n_launches += 1
        with _disable_current_modes():
            for compute, found in self.steps:
                again = [value for value in tree_flatten(compute())[0] if isinstance(value, torch.Tensor)]
                for value, new in zip(found, again, strict=True):
                    if new is not value:
                        value.copy_(new)


def _place():
    """Return the innermost line of the project on the stack, or of anything but torch."""
    frame, other = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and name.startswith(ROOT):
            return f"{name.removeprefix(ROOT)}:{frame.f_lineno}"
        if not other and name != __file__ and "/torch/" not in name:
            other = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return other


class _Numbered(TorchFunctionMode):
    """Makes `cuda` `cuda:0`, which a build without CUDA cannot do by itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func("cuda", args[0]) if args and type(args[0]) is int else func(*args, **kwargs)
        if func is torch.Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], f"cuda:{args[1]}", *args[2:])

        def numbered(value):
            is_bare = isinstance(value, torch.device) and value.type == "cuda" and value.index is None
            return (
                torch.device("cuda:0") if is_bare or (isinstance(value, str) and value == "cuda") else value
            )

        args, kwargs = tuple(map(numbered, args)), {key: numbered(value) for key, value in kwargs.items()}
        device = kwargs.get("device")
        is_new = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if is_new and _is_cuda(device):  # made on the host and copied
            made = func(*args, **{**kwargs, "device": "cpu"})
            return _active[-1].run(aten._to_copy.default, (made,), {"device": torch.device(device)})
        return func(*args, **kwargs)


@contextmanager
def fake_cuda(n_devices=1, free=(79 * 2**30,)):
    """Pretend that there are `n_devices` CUDA devices while the body runs; yields a FakeCuda.

    free: bytes of each device that are free; the others have as many as the last one.
    """
    device, size = FakeCuda(n_devices), 80 * 2**30
    properties = mock.Mock(total_memory=size, multi_processor_count=132, major=9, minor=0)
    properties.name = "fake"
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": n_devices,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "fake",
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "_lazy_init": None,
        "empty_cache": None,
        "set_device": None,
        "synchronize": None,
        "device": nullcontext(),
        "reset_peak_memory_stats": None,
    }
    stand_ins = {"CUDAGraph": FakeGraph, "graph": FakeGraph.recording}

    def mem_get_info(device=0):
        return free[min(torch.device(device).index or 0, len(free) - 1)], size

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.cuda, "mem_get_info", mem_get_info))
        # The modes are of this thread alone, so that transformers has to load weights in it.
        stack.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        torch._C._ensureCUDADeviceGuardSet()  # in a build without CUDA: a guard that does nothing
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        _active.append(device)
        stack.callback(_active.pop)
        stack.enter_context(device)
        stack.enter_context(_Numbered())
        yield device
