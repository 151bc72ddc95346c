"""PyTorch modules through the library's kernels, on a CPU: tensors that pass for some of a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cpu_cuda  # noqa: E402
from cpu_cuda import memory, standin  # noqa: E402
from torch_cases import random_mask, random_state, random_tensor  # noqa: E402

from sbnet_cupy._packing import pack, packing_of  # noqa: E402
from sbnet_cupy.torch import SparseBlockGrid, SparseBottleneck, SparseConv2d, _arrays, _folding, _packing  # noqa: E402

if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
    pytest.skip(cpu_cuda.why_unavailable(), allow_module_level=True)


class _TensorMemory(memory.Memory):
    """Memory of a tensor, for kernels that run on a CPU."""

    def __init__(self, address: int, size: int, owner: Any) -> None:
        self.address, self.size, self._owner = address, size, owner
        memory._live.add(self)


def _array(address: int, size: int, form: Any, owner: Any) -> Any:
    bytes_ = _TensorMemory(address, size, owner).bytes()
    return standin.ndarray.of(np.ndarray(form.shape, form.dtype, bytes_, 0, form.strides))


def _array_of(tensor: Any, shape: Any, strides: Any, device: Any) -> Any:
    form = _arrays._numpy_form(shape, tensor.dtype, strides)
    return _array(tensor.data_ptr(), tensor.untyped_storage().nbytes(), form, tensor)


def _array_at(place: Any) -> Any:
    form = _arrays._numpy_form(place.shape, place.dtype, place.strides)
    size = form.dtype.itemsize + sum(s * (n - 1) for s, n in zip(form.strides, form.shape, strict=True))
    return _array(place.address, size, form, None)


@contextmanager
def device(tf32: bool = False) -> Iterator[None]:
    """Let tensors of the CPU be those of a device that runs kernels on the CPU."""
    setting = _folding._Setting(None, tf32, 0)
    caches = _packing._conv_weights_at, _packing._bottleneck_weights_at
    with cpu_cuda.device(), pytest.MonkeyPatch.context() as patch:
        for module in (_arrays, _packing):
            patch.setattr(module, "on_host", lambda tensor: False)
        patch.setattr(_arrays, "_cupy_array", _array_of)
        patch.setattr(_arrays.Place, "array", _array_at)
        patch.setattr(_folding._Setting, "now", lambda device: setting)
        for cache in caches:
            cache.cache_clear()
        yield
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize("name", ["conv", "bottleneck", "in-place"])
@pytest.mark.parametrize(("dtype", "tf32"), [(torch.float32, False), (torch.float32, True), (torch.float16, False)])
def test_inference_by_fused_kernels_packs_once(
    name: str, dtype: Any, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SparseConv2d(16, 8, 3) if name == "conv" else SparseBottleneck(16, 8, inplace=name == "in-place")
    x = random_tensor(2, 16, 21, 30, dtype=dtype).contiguous(memory_format=torch.channels_last)
    grid = SparseBlockGrid.from_mask(random_mask(2, 21, 30), 8, capacity=12)
    module = random_state(module).to(dtype).eval()
    with torch.no_grad():
        exact = module.double()(x.double(), grid)
        module.to(dtype)
        packings: list[bool] = []
        with device(tf32):
            from sbnet_cupy import _fused  # with the stand-in where there is no CuPy

            launch = _fused.pack
            monkeypatch.setattr(_fused, "pack", lambda *given: packings.append(given[2]) or launch(*given))
            found = [module(x.clone(memory_format=torch.preserve_format), grid) for _ in range(2)]
            weights, words, kept_tf32 = module.folded()
    assert packings == [tf32] * module.packed
    assert kept_tf32 == tf32
    for weight, packed in zip(weights, words, strict=False):
        packing = packing_of(tuple(weight.shape), weight.element_size())
        np.testing.assert_array_equal(packed.numpy().view(np.uint32), pack(weight.numpy(), packing, tf32))
    assert torch.equal(*found)
    # Factors keep 10 bits, or 23, and each error of 2**-11 or 2**-24 of a product meets a few others.
    rounding = 2.0**-9 if tf32 or dtype == torch.float16 else 2.0**-22
    assert float((found[0].double() - exact).abs().max()) <= rounding * float(exact.abs().max())
    assert float((exact - (0 if name == "conv" else x.double())).abs().max()) > 1
