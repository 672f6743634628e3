"""A stand-in for a CUDA device: tensors that say they are on cuda:0 and are computed on the CPU.

    with PretendedCuda() as cuda:
        images = host_images.to("cuda:0")
        ...                    # an operator that mixes images with tensors of the host raises MixedDevices
    cuda.uploads               # shapes of what was copied from the host to the device, in order
    cuda.total(*COSTS)         # how often the host waited for the device, copied, and launched a kernel
    cuda.table(*COSTS)         # the same by source line

What CUDA allows is allowed: tensors of no dimension, which travel as arguments of a kernel, and copies between devices.
Launches are counted as operators that compute something. On a device some are several kernels (a sort, NMS), and
torch's optimisers join many into one: the number compares two versions of one function, and is no time.
`Tensor.backward` is not covered: torch asks the driver before it starts.
"""

import functools
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]

WAIT = "wait"  # the host needs a number from the device before it can go on
DOWNLOAD = "download"  # so does a copy to the host
QUEUED = "queued download"  # one to pinned memory is not waited for: it holds anything until an event after it is
BLOCKING = "blocking upload"  # from memory that is not pinned: the host waits until it is copied
UPLOAD = "upload"  # from pinned memory, while the host goes on
LAUNCH = "launch"
COSTS = (WAIT, DOWNLOAD, QUEUED, BLOCKING, UPLOAD)

_COPIES = {"_to_copy", "to", "copy_"}
# operators whose result has a size or a value that the host must know
_WAITS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select", "bincount", "nms"),
    *("unique_dim", "_unique", "_unique2", "unique_consecutive", "linalg_eigh"),
}
# operators that only reserve memory
_RESERVE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class MixedDevices(AssertionError):
    """An operator was given tensors of the device and of the host."""


class Cost(NamedTuple):
    """What an operator costs beyond its computation, and the project's line that called it."""

    kind: str
    file: str  # relative to the repository
    function: str
    line: int

    def __str__(self) -> str:
        text = linecache.getline(str(ROOT / self.file), self.line).strip()
        return f"{self.kind:15} {self.file}:{self.line} {self.function}: {text}"


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

    def tolist(self) -> Any:  # torch's own refuses subclasses
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


class _Stream:
    """What computes: an event of it has come when all downloads that were queued before are there."""

    def __init__(self, cuda: "PretendedCuda") -> None:
        self.cuda = cuda

    def record_event(self, _event: object) -> "_Event":
        return _Event(self.cuda, list(self.cuda.queued))


class _Event(NamedTuple):
    cuda: "PretendedCuda"
    before: list[tuple[torch.Tensor, torch.Tensor]]

    def synchronize(self) -> None:
        self.cuda.note(WAIT, ())
        for target, values in self.before:
            target.numpy()[...] = values.numpy()  # whatever mode torch is in by now


class PretendedCuda(TorchDispatchMode):
    """While it is entered, torch has one CUDA device, that of `OnDevice`.

    largest: bytes of the largest tensor that it has memory for; beyond it torch.OutOfMemoryError is raised.
    """

    def __init__(self, largest: float = float("inf")) -> None:
        super().__init__()
        self.largest = largest
        self.uploads: list[tuple[int, ...]] = []
        self.costs: Counter[Cost] = Counter()
        self._pinned: list[torch.Tensor] = []  # kept, so that no other tensor gets the memory of one
        self.queued: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies to the host that nothing has waited for

    def total(self, *kinds: str) -> int:
        return sum(count for cost, count in self.costs.items() if cost.kind in kinds)

    def table(self, *kinds: str) -> str:
        lines = sorted((cost, count) for cost, count in self.costs.items() if cost.kind in kinds)
        return "\n".join(f"{count:5} {cost}" for cost, count in lines)

    def by_function(self, *kinds: str) -> dict[str, int]:
        """Counts by kind, file and function, which outlast changes of other lines."""
        counts: Counter[str] = Counter()
        for cost, count in self.costs.items():
            if cost.kind in kinds:
                counts[f"{cost.kind}: {cost.file} {cost.function}"] += count
        return dict(sorted(counts.items()))

    def __enter__(self) -> Self:
        torch._C._ensureCUDADeviceGuardSet()
        with ExitStack() as stack:
            for name, value in (
                ("_lazy_init", None),
                ("is_available", True),
                ("device_count", 1),
                ("current_device", 0),
                ("is_bf16_supported", True),
                ("empty_cache", None),
                ("device", nullcontext()),
                ("current_stream", _Stream(self)),
                ("Event", None),
            ):
                stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
            # torch does not dispatch what makes tensors of Python's numbers, and pins nothing without a device
            for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
                made = functools.partial(self._from_python, name, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, _method(made) if owner is torch.Tensor else made))
            stack.enter_context(mock.patch.object(torch, "empty", functools.partial(self._empty, torch.empty)))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # operators that no CPU has
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
        kwargs = kwargs or {}
        if _name(func) == "copy_" and isinstance(args[1], OnDevice) and self._is_hidden(args[0], *args[2:], **kwargs):
            self.note(QUEUED, tuple(args[1].shape))
            self.queued.append((args[0], args[1].host.clone()))
            args[0].view(torch.uint8).fill_(0xA5)
            return args[0]
        result = _compute(func, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, OnDevice) and leaf.numel() * leaf.itemsize > self.largest:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {leaf.numel() * leaf.itemsize}")
        for kind, shape in _costs(func, args, kwargs, result, self._is_pinned):
            self.note(kind, shape)
        return result

    def note(self, kind: str, shape: tuple[int, ...]) -> None:
        self.costs[Cost(kind, *_caller())] += 1
        if kind in (UPLOAD, BLOCKING):
            self.uploads.append(shape)

    def _empty(self, make: Any, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        """torch.empty, but that nothing is pinned without a device: it is noted as such."""
        made: torch.Tensor = make(*args, **kwargs)
        if pin_memory:
            self._pinned.append(made)
        return made

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        start = tensor.untyped_storage().data_ptr()
        return any(pinned.untyped_storage().data_ptr() == start for pinned in self._pinned)

    def _is_hidden(self, pinned: torch.Tensor, non_blocking: bool = False) -> bool:
        return non_blocking and not isinstance(pinned, OnDevice) and self._is_pinned(pinned)

    def _from_python(self, name: str, make: Any, *args: Any, **kwargs: Any) -> Any:
        """A factory of tensors from Python's numbers, for the device where it is asked for."""
        like = args[0] if name == "new_tensor" else None
        device = kwargs.get("device", like.device if like is not None else None)
        if (
            device is None
            or torch.device(device).type != "cuda"
            or isinstance(args[0 if like is None else 1], OnDevice)
        ):
            return make(*args, **kwargs)
        if like is not None:
            make, args = torch.tensor, args[1:]
            kwargs = {"dtype": like.dtype, **kwargs}
        host = make(*args, **{**kwargs, "device": "cpu"})
        self.note(BLOCKING, tuple(host.shape))
        return OnDevice(host)


def _method(function: Any) -> Any:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


def _caller() -> tuple[str, str, int]:
    """File, function and line of the project's code, tests aside, that called the operator; else of the test."""
    test, frame = ("", "", 0), sys._getframe(1)
    while frame is not None:
        file = _project_file(frame.f_code.co_filename)
        if file:
            place = (file, frame.f_code.co_qualname, frame.f_lineno)
            if not file.startswith("tests/"):
                return place
            test = test if test[0] else place
        frame = frame.f_back  # type: ignore[assignment]
    return test


@functools.cache
def _project_file(name: str) -> str:
    """Path relative to the repository; empty for other files, and for this one."""
    path = Path(name)
    ours = path != Path(__file__) and path.is_relative_to(ROOT) and ".venv" not in path.parts
    return path.relative_to(ROOT).as_posix() if ours else ""


def _costs(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, is_pinned: Callable[[torch.Tensor], bool]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What calling an operator cost, with the shape of what it was given first."""
    name = _name(func)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_device = _on_device(tensors)
    to_device = _belongs_to_device(func, args, kwargs)
    if name in _COPIES and tensors:
        source = tensors[1] if name == "copy_" else tensors[0]
        if to_device and not isinstance(source, OnDevice):
            hidden = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            yield UPLOAD if hidden and is_pinned(source) else BLOCKING, tuple(source.shape)
            return
        if not to_device and isinstance(source, OnDevice):
            yield DOWNLOAD, tuple(source.shape)
            return
    if not to_device and not on_device:
        return
    shape = tuple(tensors[0].shape) if tensors else ()
    if name in _WAITS or (name == "where" and len(args) == 1):
        yield WAIT, shape
    elif name.startswith("index") and any(t.dtype == torch.bool for t in tree_leaves(args[1]) if torch.is_tensor(t)):
        yield WAIT, shape  # how many there are is the size of the result
    views = not func._schema.is_mutable and {_address(t) for t in _on_device(result)} <= {
        _address(t) for t in on_device
    }
    if not views and name not in _RESERVE:
        yield LAUNCH, shape


def _on_device(leaves: Any) -> list[OnDevice]:
    return [leaf for leaf in tree_leaves(leaves) if isinstance(leaf, OnDevice)]


def _address(tensor: OnDevice) -> int:
    """Of the memory that a tensor describes."""
    return tensor.host.untyped_storage().data_ptr()


def _name(func: Any) -> str:
    name: str = func._schema.name.partition("::")[2]
    return name


def _belongs_to_device(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the result of an operator is on the device."""
    if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
        return isinstance(args[0], OnDevice)
    leaves = tree_leaves((args, kwargs))
    asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    return asked[0].type == "cuda" if asked else any(isinstance(leaf, OnDevice) for leaf in leaves)


def _compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute an operator on the CPU; its result is on the device that it belongs to. Raises MixedDevices."""
    name = _name(func)
    if name == "_has_compatible_shallow_copy_type":  # a module asks whether a parameter can be moved in place
        return False
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_host = [t for t in tensors if not isinstance(t, OnDevice)]
    if len(on_host) < len(tensors) and name not in _COPIES and any(t.dim() for t in on_host):
        raise MixedDevices(f"{name} of {[tuple(t.shape) for t in tensors]}: {len(on_host)} of them are on the host")
    result = func(*tree_map(_on_host, tuple(args)), **tree_map(_on_host, dict(kwargs)))
    if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
        return args[0]
    if _belongs_to_device(func, args, kwargs):
        return tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
    return result


def _on_host(leaf: Any) -> Any:
    """An argument as the CPU is given it."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.host if isinstance(leaf, OnDevice) else leaf
