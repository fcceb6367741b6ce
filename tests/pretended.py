"""A CUDA device that is pretended: tensors that say they lie on cuda:0, and lie on the CPU.

Real values flow, so that whole runs come to the CPU's bits. What a card would refuse, or wait for, is noted by the
line of the package that asked for it.
"""

import traceback
import warnings
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
WAITS = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default),
    *(aten._unique2.default, aten.unique_dim.default, aten.bincount.default, aten.repeat_interleave.Tensor),
}
COPIES = {aten._to_copy.default, aten.copy_.default}
REFUSED = {  # by torch.use_deterministic_algorithms, on CUDA
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward"),
    *("avg_pool3d_backward", "max_pool3d_with_indices_backward", "fractional_max_pool2d_backward", "max_unpool2d"),
    *("upsample_linear1d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "replication_pad2d_backward"),
    *("nll_loss2d_forward", "_ctc_loss", "put_", "histc", "kthvalue", "median.dim", "grid_sampler_2d_backward"),
    *("scatter_reduce", "cumsum"),
}


def tensors(values):
    """All tensors in nested lists and tuples."""
    return [
        x
        for value in values
        for x in (tensors(value) if isinstance(value, (list, tuple)) else [value])
        if isinstance(x, torch.Tensor)
    ]


def mapped(change, value):
    """``value`` with every tensor in nested lists, tuples and dictionaries changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(change, each) for key, each in value.items()}
    return type(value)(mapped(change, each) for each in value) if type(value) in (list, tuple) else value


class Mixed(RuntimeError):
    """An operation on tensors of both devices."""


def wrapped(cls, held):
    """A tensor of a subclass, which torch takes for one on ``meta``, and which holds another one."""
    made = torch.Tensor._make_wrapper_subclass(
        cls,
        held.shape,
        strides=held.stride(),
        dtype=held.dtype,
        device="meta",
        storage_offset=held.storage_offset(),
    )
    made.held = held
    return made


class Pretended(torch.Tensor):
    """A tensor that says it is on cuda:0; torch takes it for one on ``meta``, whose backward pass is the CPU's."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    __new__ = staticmethod(wrapped)

    @property
    def device(self):
        return CUDA

    is_cuda = True

    def __repr__(self):
        return f"Pretended({self.held!r})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the device")


class Device(TorchDispatchMode):
    """Keeps the pretended device.

    Attributes:
        noted: while it is ``watched``, what the CPU had to wait for, what blocked it, what it may read before it is
            there, and what deterministic mode refuses: (kind, operation, elements, line of the package).
        strict: whether what waits raises, as `torch.cuda.set_sync_debug_mode` has it.
    """

    def __init__(self):
        super().__init__()
        self.noted, self.watched, self.strict = [], True, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tensors([args, *kwargs.values()])
        there = [x for x in leaves if isinstance(x, Pretended)]
        if not there and kwargs.get("device") is None:
            return func(*args, **kwargs)
        here = [x for x in leaves if not isinstance(x, Pretended)]
        goes_here = False if kwargs.get("device") is None else torch.device(kwargs["device"]).type == "cpu"
        if func is aten.copy_.default:
            goes_here = not isinstance(args[0], Pretended)
        self._note(func, args, kwargs, there, here, goes_here)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        args, kwargs = mapped(lambda x: x.held if isinstance(x, Pretended) else x, (args, kwargs))
        result = func(*args, **kwargs)
        if goes_here:
            return result
        known = {id(x.held): x for x in there}  # what is changed in place stays the same tensor
        return mapped(lambda x: known[id(x)] if id(x) in known else Pretended(x), result)

    def _note(self, func, args, kwargs, there, here, goes_here):
        if there and here and func not in COPIES and any(x.dim() for x in here):
            raise Mixed(f"{func} on both devices, in {line()}")
        crosses = func in COPIES and bool(there if goes_here else here)
        masks = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        at_once = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        elements = (there or here)[0].numel() if there or here else 0
        if crosses and goes_here and at_once:
            self._add("races", func, elements)
        elif (there and (func in WAITS or masks)) or (crosses and goes_here):
            self._add("waits", func, elements)
        elif crosses and not at_once:
            self._add("blocks", func, elements)
        if there and torch.are_deterministic_algorithms_enabled() and refused(func):
            self._add("refused", func, elements)

    def _add(self, kind, func, elements):
        if self.strict and kind in ("waits", "blocks"):
            raise RuntimeError(f"called a synchronizing CUDA operation, {func}, in {line()}")
        if self.watched:
            self.noted.append((kind, str(func), elements, line()))


@cache
def refused(func):
    return bool({func.overloadpacket.__name__, str(func).removeprefix("aten.")} & REFUSED)


def line():
    """The line that is being executed, torch's own aside: its file, number and text."""
    own = ("/torch/", "/pretended.py", "/functools.py", "/contextlib.py")
    frame = [each for each in traceback.extract_stack() if not any(part in each.filename for part in own)][-1]
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}: {frame.line}"


@contextmanager
def pretended():
    """Have one CUDA device until the block ends, and yield it."""

    def moved(make):
        def made(*args, device=None, **kwargs):
            value = make(*args, **kwargs)
            return value if device is None else value.to(device)

        return made

    device = Device()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*meta parameter")  # what is loaded is copied all the same
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "set_device": lambda device: None,
            "current_device": lambda: 0,
            "set_sync_debug_mode": lambda mode: setattr(device, "strict", mode == "error"),
            "get_device_name": lambda device=None: "a pretended device",
            "is_bf16_supported": lambda including_emulation=True: False,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.backends.cudnn, "version", lambda: 90000)
        patch.setattr(torch.accelerator, "current_stream", lambda: SimpleNamespace(is_capturing=lambda: False))
        patch.setattr(torch, "tensor", moved(torch.tensor))
        patch.setattr(torch, "as_tensor", moved(torch.as_tensor))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with device:
                yield device
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
