"""Products at addresses of the stand-in's memory: what stands in for cuBLAS and for cuDNN."""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from . import memory

Array = np.ndarray[Any, Any]


class HostMultiplier:
    """``sbnet_cupy._cublas.Multiplier``, on the host."""

    def __enter__(self) -> HostMultiplier:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def multiply(self, x: int, w: int, y: int, sizes: Any, dtypes: Any, accumulate: bool, tf32: bool) -> None:
        rows, inner, columns = sizes
        factor, result = dtypes
        wide = np.float64 if factor.itemsize == 8 else np.float32
        product = _matrix(x, (rows, inner), factor).astype(wide) @ _matrix(w, (inner, columns), factor).astype(wide)
        target = _matrix(y, (rows, columns), result)
        target[...] = target.astype(wide) + product if accumulate else product


def _matrix(address: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    """The matrix, which must lie in one array."""
    return _at(address, math.prod(shape), dtype).reshape(shape)


def _at(address: int, count: int, dtype: np.dtype[Any]) -> Array:
    size = count * dtype.itemsize
    if not memory.holds(address, size):
        raise IndexError(f"{size} bytes leave their array: {memory.describe(address + size)}")
    if address % dtype.itemsize:
        raise ValueError(f"numbers of {dtype} at address {address:#x}")
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)


class HostTensor:
    """A tensor of a :class:`HostGraph`: a layout, without memory."""

    def __init__(self, dim: Any = None, stride: Any = None, data_type: Any = None, name: str = "") -> None:
        self.dim, self.stride, self.data_type = dim, stride, data_type

    def set_output(self, value: bool) -> HostTensor:
        return self

    def set_data_type(self, data_type: Any) -> HostTensor:
        self.data_type = data_type
        return self

    def set_dim(self, dim: list[int]) -> HostTensor:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> HostTensor:
        self.stride = stride
        return self

    def view(self, address: int) -> Array:
        """The tensor in memory, in the order of its dimensions."""
        flat = _at(address, 1 + sum((n - 1) * s for n, s in zip(self.dim, self.stride)), self.data_type)
        strides = [s * self.data_type.itemsize for s in self.stride]
        return np.lib.stride_tricks.as_strided(flat, self.dim, strides)


class HostGraph:
    """``cudnn.pygraph`` with one convolution, in the order of steps that cuDNN asks for."""

    _STEPS = ("validate", "build_operation_graph", "create_execution_plans", "deselect_numeric_notes")
    _STEPS += ("check_support", "build_plans", "get_workspace_size")

    def __init__(self, **options: Any) -> None:
        self._done = 0
        assert options["compute_data_type"] == np.float32

    def tensor(self, **layout: Any) -> HostTensor:
        return HostTensor(**layout)

    def conv_fprop(self, *, image: Any, weight: Any, padding: Any, stride: Any, dilation: Any, **_: Any) -> HostTensor:
        assert (padding, dilation) == ([0, 0], [1, 1])
        self._tensors, self._stride, self._result = (image, weight), stride, HostTensor()
        return self._result

    def __getattr__(self, step: str) -> Any:
        if step != self._STEPS[self._done]:
            raise AttributeError(f"{step} before {self._STEPS[self._done]}")
        self._done += 1
        return lambda *_: 0

    def execute(self, buffers: Any, workspace: int, *, handle: int) -> None:
        assert self._done == len(self._STEPS)
        assert handle == 7
        x, w = (t.view(buffers[t]).astype(np.float32) for t in self._tensors)
        y = self._result.view(buffers[self._result])
        (kh, kw), (sh, sw) = w.shape[2:], self._stride
        for i, j in np.ndindex(y.shape[2:]):
            y[:, :, i, j] = np.einsum("ncab,kcab->nk", x[:, :, i * sh :, j * sw :][:, :, :kh, :kw], w)


#: ``cudnn``.
HOST_CUDNN = SimpleNamespace(
    data_type=SimpleNamespace(
        HALF=np.dtype(np.float16), BFLOAT16=np.dtype(ml_dtypes.bfloat16), FLOAT=np.dtype(np.float32)
    ),
    heur_mode=SimpleNamespace(A=0, FALLBACK=1),
    numerical_note=SimpleNamespace(
        REDUCED_PRECISION_REDUCTION=0, WINOGRAD=1, FFT=2, NONDETERMINISTIC=3, TENSOR_CORE=4, DOWN_CONVERT_INPUTS=5
    ),
    pygraph=HostGraph,
    create_handle=lambda: 7,
    set_stream=lambda handle, stream: None,
)
