"""A stand-in for a CUDA device: tensors that say they are on cuda:0 and are computed on the CPU.

    with PretendedCuda() as device:
        images = host_images.to("cuda:0")
        ...                    # an operator that mixes images with tensors of the host raises MixedDevices
    device.uploads             # shapes of what was copied from the host to the device, in order

What CUDA allows is allowed: tensors of no dimension, which travel as arguments of a kernel, and copies between devices.
Factories that make a tensor of Python data on the device (`torch.tensor(..., device="cuda")`) are not covered: torch
does not dispatch them.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_COPIES = {"aten::_to_copy", "aten::to", "aten::copy_"}


class MixedDevices(AssertionError):
    """An operator was given tensors of the device and of the host."""


class OnDevice(torch.Tensor):
    """A tensor that says it is on cuda:0; `host` holds its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> Self:
        pretended: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device("cuda", 0),
        )
        pretended.host = host
        return pretended

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})[0]


class PretendedCuda(TorchDispatchMode):
    """While it is entered, torch has one CUDA device, that of `OnDevice`."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads: list[tuple[int, ...]] = []

    def __enter__(self) -> Self:
        torch._C._ensureCUDADeviceGuardSet()
        with ExitStack() as stack:
            for name, value in (("_lazy_init", None), ("is_available", True), ("device_count", 1)):
                stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
            future = torch.__future__
            stack.callback(
                future.set_overwrite_module_params_on_conversion, future.get_overwrite_module_params_on_conversion()
            )
            future.set_overwrite_module_params_on_conversion(True)  # parameters that move change their type
            self._stack = stack.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result, uploaded = _compute(func, args, kwargs or {})
        self.uploads += uploaded
        return result


def _compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, list[tuple[int, ...]]]:
    """Compute an operator on the CPU: its result, on the device it belongs to, and the shapes of what was uploaded."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_device = [t for t in tensors if isinstance(t, OnDevice)]
    on_host = [t for t in tensors if not isinstance(t, OnDevice)]
    name = func._schema.name
    if name == "aten::_has_compatible_shallow_copy_type":  # a module asks whether a parameter can be moved in place
        return False, []
    if on_device and name not in _COPIES and any(t.dim() for t in on_host):
        raise MixedDevices(f"{name} of {[tuple(t.shape) for t in tensors]}: {len(on_host)} of them are on the host")
    in_place = func._schema.is_mutable and bool(args) and isinstance(args[0], torch.Tensor)
    asked = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    to_device = bool(on_device) if not asked else asked[0].type == "cuda"
    if in_place:
        to_device = isinstance(args[0], OnDevice)
    uploaded = [tuple(t.shape) for t in on_host] if to_device and name in _COPIES else []
    result = func(*tree_map(_on_host, tuple(args)), **tree_map(_on_host, dict(kwargs)))
    if in_place:
        return args[0], uploaded
    if to_device:
        result = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
    return result, uploaded


def _on_host(leaf: Any) -> Any:
    """An argument as the CPU is given it."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.host if isinstance(leaf, OnDevice) else leaf
