"""PyTorch tensors as the arrays that the library works on, where and when PyTorch would work."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

_DTYPES: dict[Any, Any] = {
    torch.bool: np.bool_,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.uint64: np.uint64,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
}


@functools.cache
def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    if dtype == torch.bfloat16:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    elif dtype in _DTYPES:
        found = np.dtype(_DTYPES[dtype])
    else:
        raise TypeError(f"dtype: expected one that NumPy has, or bfloat16, got {dtype}")
    return found


def namespace(device: torch.device) -> ModuleType:
    """The library whose arrays tensors on `device` become: NumPy or CuPy."""
    if device.type == "cpu":
        return np
    if device.type != "cuda":
        raise TypeError(f"device: expected a CPU or CUDA tensor, got one on {device}")
    try:
        import cupy
    except ImportError as error:
        raise ImportError('tensors on a GPU need CuPy: pip install "sbnet-cupy[cu13]"') from error
    return cupy  # type: ignore[no-any-return]


def on_host(tensor: torch.Tensor) -> bool:
    """Whether NumPy reads it."""
    return bool(tensor.device.type == "cpu")


def as_array(tensor: torch.Tensor) -> Any:
    """The NumPy or CuPy array in the memory of a tensor: nothing is copied, and nothing waited for."""
    if on_host(tensor):
        dtype, tensor = _numpy_dtype(tensor.dtype), tensor.detach()
        # NumPy takes no bfloat16 from PyTorch.
        return tensor.view(torch.int16).numpy().view(dtype) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    namespace(tensor.device)
    return _cupy_array(tensor, tensor.shape, tensor.stride(), tensor.device.index)


def as_image(tensor: torch.Tensor) -> Any:
    """A tensor ``[N, C, H, W]`` as the array ``[N, H, W, C]`` in its memory."""
    if on_host(tensor):
        return as_array(tensor).transpose(0, 2, 3, 1)
    namespace(tensor.device)
    (n, c, h, w), (sn, sc, sh, sw) = tensor.shape, tensor.stride()
    return _cupy_array(tensor, (n, h, w, c), (sn, sh, sw, sc), tensor.device.index)


def _cupy_array(tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], device: int) -> Any:
    """A CuPy array in the memory of a tensor, which it keeps alive: without the events of DLPack on two streams."""
    import cupy

    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), tensor.untyped_storage().nbytes(), tensor, device)
    form = _numpy_form(shape, tensor.dtype, strides)
    return cupy.ndarray(form.shape, form.dtype, cupy.cuda.MemoryPointer(memory, 0), form.strides)


class _Form(NamedTuple):
    """Of an array; strides in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _numpy_form(shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...]) -> _Form:
    """The form of a tensor with these strides, in elements."""
    found = _numpy_dtype(dtype)
    return _Form(tuple(shape), found, tuple(stride * found.itemsize for stride in strides))


class Place(NamedTuple):
    """Where a CUDA tensor lies, and in which form: all that makes an array of CuPy, but for the memory's owner."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Place:
        """That of a tensor."""
        return cls(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device.index)

    def array(self) -> Any:
        """The CuPy array there. It keeps nothing alive: who uses it holds the tensor."""
        import cupy

        form = _numpy_form(self.shape, self.dtype, self.strides)
        size = form.dtype.itemsize + sum(s * (n - 1) for s, n in zip(form.strides, form.shape))
        memory = cupy.cuda.UnownedMemory(self.address, size, None, self.device)
        return cupy.ndarray(form.shape, form.dtype, cupy.cuda.MemoryPointer(memory, 0), form.strides)


@contextlib.contextmanager
def at(device: torch.device) -> Iterator[None]:
    """Let CuPy work where PyTorch would: on its current stream of `device`, with memory of its allocator."""
    xp = namespace(device)
    if xp is np:
        yield
        return
    stream = _stream(torch.cuda.current_stream(device).cuda_stream)
    with xp.cuda.Device(device.index), stream, xp.cuda.using_allocator(_allocator()):
        yield


@functools.lru_cache(maxsize=256)
def _stream(pointer: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_StreamPointer(pointer))


class _StreamPointer:
    """A CUDA stream that somebody else owns, by the protocol of the CUDA libraries for Python."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@functools.cache
def _allocator() -> Any:
    """PyTorch's allocator, as CuPy calls one. It knows of captures: what a CUDA graph uses comes from its own pool."""
    import cupy

    def malloc(size: int, device: int) -> int:
        address: int = torch.cuda.caching_allocator_alloc(size, device)  # for the current stream
        return address

    def free(address: int, device: int) -> None:
        torch.cuda.caching_allocator_delete(address)

    return cupy.cuda.PythonFunctionAllocator(malloc, free).malloc


def channels_last(tensor: torch.Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, so that results should lie so as well."""
    return bool(tensor.stride(1) == 1)
