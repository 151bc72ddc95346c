"""The element-wise step ``act(x*scale + shift)``: batch norm in inference form, a bias, an activation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._validate import Spec, check_place, spec_of

FLOATING = ("float16", "bfloat16", "float32", "float64")


class Affine(NamedTuple):
    """A scale and a shift for each channel, each an array ``[C]`` or None, and whether ReLU follows.

    Where only the form of a call matters, it holds the specs of the arrays in their place.
    """

    scale: Any = None
    shift: Any = None
    relu: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every number as it is."""
        return self.scale is None and self.shift is None and not self.relu

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that there are, by name."""
        named = (("scale", self.scale), ("shift", self.shift))
        return {name: array for name, array in named if array is not None}

    @property
    def spec(self) -> Affine:
        """The same with the specs of the arrays."""
        return self if self.is_identity else Affine(_spec(self.scale), _spec(self.shift), self.relu)

    def aligned(self) -> Affine:
        """The same with CuPy arrays as kernels read them: contiguous, from a multiple of 16 bytes on."""
        if self.scale is None and self.shift is None:
            return self
        return Affine(_aligned(self.scale), _aligned(self.shift), self.relu)

    @property
    def addresses(self) -> tuple[int, int]:
        """Where the arrays lie on the device, or 0."""
        if self.scale is None and self.shift is None:
            return 0, 0
        return _address(self.scale), _address(self.shift)


IDENTITY = Affine()


def wide_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """In which dtype numbers of a floating dtype are computed: half types in float32."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def parse_activation(activation: Any) -> bool:
    """Whether the activation is ReLU."""
    if activation is None:
        return False
    if isinstance(activation, str) and activation == "relu":
        return True
    raise ValueError(f"activation: expected None or 'relu', got {activation!r}")


def check_floating(name: str, spec: Spec) -> None:
    """Raise unless the dtype is one that is computed with."""
    if spec.dtype.name not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {spec.dtype}")


def check_channels(name: str, spec: Spec | None, dtype: np.dtype[Any], channels: int, device: int) -> None:
    """Raise unless it holds one number for each channel of a tensor of `dtype`, in the dtype of its arithmetic."""
    if spec is None:
        return
    wide = wide_dtype(dtype)
    if spec.dtype != wide:
        raise TypeError(f"{name}: expected dtype {wide} for a tensor of {dtype}, got {spec.dtype}")
    if spec.shape != (channels,):
        raise ValueError(f"{name}: expected shape ({channels},), one number for each channel, got {spec.shape}")
    check_place(name, spec, device)


def _spec(array: Any) -> Spec | None:
    return None if array is None else spec_of(array)


def _aligned(channels: Any) -> Any:
    if channels is None or (channels.flags.c_contiguous and channels.data.ptr % 16 == 0):
        return channels
    return channels.copy()


def _address(channels: Any) -> int:
    return 0 if channels is None else channels.data.ptr
