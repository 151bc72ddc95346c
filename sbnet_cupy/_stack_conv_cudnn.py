"""The convolution of a stack by cuDNN, through its graph API. Imported only where cuDNN is asked for.

A plan takes milliseconds to build for each new shape. So plans are kept, and stacks are given room for a number of rows
that is a power of two or one and a half times that: few sizes, and at most half of the rows too many.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple

import cudnn
import cupy
import numpy as np

from ._conv_geometry import Pair, valid_size

_DATA_TYPES = {
    "float16": cudnn.data_type.HALF,
    "bfloat16": cudnn.data_type.BFLOAT16,
    "float32": cudnn.data_type.FLOAT,
}

#: What a plan must not do: round partial sums, transform (which has another error than a sum), or depend on timing.
_UNWANTED = ("REDUCED_PRECISION_REDUCTION", "WINOGRAD", "FFT", "NONDETERMINISTIC")
#: What IEEE float32 must not do besides.
_TF32 = ("TENSOR_CORE", "DOWN_CONVERT_INPUTS")


def room(rows: int) -> int:
    """The next power of two, or one and a half times one."""
    power = 1 << max(0, rows - 1).bit_length()  # the first that holds the rows
    return rows if rows == 0 else power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


def convolve(stack: Any, w: Any, strides: Pair, tf32: bool) -> Any:
    """The convolution as a new, contiguous array of the dtype of the stack; sums are float32, rounded once.

    Allocates the result, the weights with output channels first, as cuDNN reads them, and the plan's workspace.
    """
    rows, height, width, channels = stack.shape
    kh, kw, _, features = w.shape
    out_size = valid_size((height, width), (kh, kw), strides)
    result = cupy.empty((rows, *out_size, features), stack.dtype)
    if 0 in (rows, *out_size, channels, features):
        result.fill(0)
        return result
    plan = _plan(cupy.cuda.runtime.getDevice(), stack.shape, w.shape, strides, stack.dtype, tf32)
    workspace = cupy.cuda.alloc(plan.workspace)
    buffers = {
        plan.image: _matrix(stack),
        plan.weight: cupy.ascontiguousarray(w.transpose(3, 0, 1, 2)),
        plan.result: result,
    }
    plan.graph.execute({key: array.data.ptr for key, array in buffers.items()}, workspace.ptr, handle=_handle())
    return result


def _matrix(array: Any) -> Any:
    """The array, or a copy, dense and aligned to 16 bytes, as plans expect."""
    if array.flags.c_contiguous and array.data.ptr % 16 == 0:
        return array
    return array.copy()


class _Plan(NamedTuple):
    graph: Any
    image: Any
    weight: Any
    result: Any
    workspace: int


@functools.lru_cache(maxsize=256)
def _plan(
    device: int, stack: tuple[int, ...], w: tuple[int, ...], strides: Pair, dtype: np.dtype[Any], tf32: bool
) -> _Plan:
    """The fastest plan by cuDNN's own judgement, for a device and these shapes."""
    rows, height, width, channels = stack
    kh, kw, _, features = w
    kind, total = _DATA_TYPES[dtype.name], cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=total, compute_data_type=total, handle=_handle())
    image = graph.tensor(name="image", data_type=kind, **_channels_last(rows, height, width, channels))
    weight = graph.tensor(name="weight", data_type=kind, **_channels_last(features, kh, kw, channels))
    result = graph.conv_fprop(
        image=image, weight=weight, padding=[0, 0], stride=list(strides), dilation=[1, 1], compute_data_type=total
    )
    layout = _channels_last(rows, *valid_size((height, width), (kh, kw), strides), features)
    result.set_output(True).set_data_type(kind).set_dim(layout["dim"]).set_stride(layout["stride"])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    notes = _UNWANTED + (_TF32 if dtype.name == "float32" and not tf32 else ())
    graph.deselect_numeric_notes([getattr(cudnn.numerical_note, name) for name in notes])
    graph.check_support()
    graph.build_plans()
    return _Plan(graph, image, weight, result, graph.get_workspace_size())


def _channels_last(n: int, h: int, w: int, c: int) -> dict[str, list[int]]:
    """Sizes in cuDNN's order N, C, H, W, and strides of memory in the order N, H, W, C."""
    return {"dim": [n, c, h, w], "stride": [h * w * c, 1, w * c, c]}


_per_thread = threading.local()


def _handle() -> Any:
    """The handle of the calling thread for the current device, set to the current stream."""
    handles = vars(_per_thread).setdefault("handles", {})
    device = cupy.cuda.runtime.getDevice()
    if device not in handles:
        handles[device] = cudnn.create_handle()
    cudnn.set_stream(handle=handles[device], stream=cupy.cuda.get_current_stream().ptr)
    return handles[device]
