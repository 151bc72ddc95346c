"""Weights of residual bottlenecks, and batch norm folded to what they hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ._affine import IDENTITY, Affine, check_channels, check_floating, wide_dtype
from ._conv_geometry import Pair
from ._validate import Look, Spec, array_namespace, check_place, look_at, spec_of


class WeightsForm:
    """All that calls have to know of weights, but for addresses: a key of caches, whose hash is computed once."""

    def __init__(self, looks: tuple[tuple[str, Look], ...]) -> None:
        self.looks = looks
        self._hash = hash(looks)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, WeightsForm) and self.looks == other.looks)

    @functools.cached_property
    def specs(self) -> dict[str, Spec]:
        """Those of the arrays that there are, by name."""
        return {name: Spec(*look) for name, look in self.looks}

    @property
    def convs(self) -> tuple[Spec, Spec, Spec]:
        """Those of the convolutions."""
        return self.specs["conv1"], self.specs["conv2"], self.specs["conv3"]


@dataclass(frozen=True, eq=False)
class BottleneckWeights:
    """Weights of one bottleneck, all NumPy arrays or all CuPy arrays of one device.

    Attributes
    ----------
    conv1, conv2, conv3 : ndarray, shapes (k1h, k1w, C, B), (k2h, k2w, B, D), (k3h, k3w, D, K)
        Weights of the convolutions: usually 1x1, 3x3 and 1x1, and ``B == D``. float16, bfloat16, float32 or float64.
    scale1, shift1 : ndarray, shape (C,), or None
        Batch norm before the first convolution, as :func:`fold_batch_norm` returns it: float32, or float64 for
        convolutions of float64. Both None: neither batch norm nor ReLU there, for an input that has had them.
    scale2, shift2 : ndarray, shape (B,)
        Before the second convolution.
    scale3, shift3 : ndarray, shape (D,)
        Before the third.
    project : ndarray, shape (1, 1, C, K), or None
        Weights of the shortcut; None is the identity.

    Raises
    ------
    TypeError, ValueError
        Arrays that do not fit together.
    """

    conv1: Any
    conv2: Any
    conv3: Any
    scale1: Any
    shift1: Any
    scale2: Any
    shift2: Any
    scale3: Any
    shift3: Any
    project: Any = None

    def __post_init__(self) -> None:
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.scale1 is None and self.shift1 is None:
            del arrays["scale1"], arrays["shift1"]
        if self.project is None:
            del arrays["project"]
        array_namespace(arrays)
        _check_weights(tuple((name, spec_of(array)) for name, array in arrays.items()))

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        """The arrays that there are, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: array for name, array in named.items() if array is not None}

    @functools.cached_property
    def form(self) -> WeightsForm:
        """What calls with these weights are prepared for."""
        return WeightsForm(tuple((name, look_at(array)) for name, array in self.arrays.items()))

    def __getstate__(self) -> dict[str, Any]:
        # Not what is cached: a copy has arrays of its own, which may lie elsewhere.
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def ksizes(self) -> tuple[Pair, Pair, Pair]:
        """Kernel sizes of the convolutions, for :func:`calc_block_params_res_block`."""
        return self.conv1.shape[:2], self.conv2.shape[:2], self.conv3.shape[:2]

    @classmethod
    def random(
        cls,
        channels: int,
        bottleneck: int,
        *,
        ksize: tuple[int, int] = (3, 3),
        out_channels: int | None = None,
        seed: int = 0,
        dtype: Any = np.float32,
        xp: Any = np,
    ) -> BottleneckWeights:
        """Random weights that keep the magnitude of activations, for tests and benchmarks.

        Parameters
        ----------
        channels, bottleneck : int
            Channels of the image, and of the second convolution.
        ksize : (int, int)
            Kernel size of the second convolution. The others are 1x1.
        out_channels : int, optional
            Channels of the result; where it is given, there is a projection.
        seed : int
            The same seed gives the same numbers in NumPy and CuPy.
        dtype : dtype
            Of the convolutions.
        xp : module
            ``numpy`` or ``cupy``: where to put them.

        Returns
        -------
        BottleneckWeights
            Convolutions are normal with variance ``2 / (kh*kw*C)`` (K. He et al., Delving Deep into Rectifiers, 2015);
            scales lie in 0.5 to 1.5 and shifts in -0.5 to 0.5.
        """
        rng = np.random.default_rng(seed)
        dtype = np.dtype(dtype)
        out = channels if out_channels is None else out_channels

        def conv(kh: int, kw: int, c: int, k: int) -> Any:
            return xp.asarray((rng.standard_normal((kh, kw, c, k)) * np.sqrt(2 / (kh * kw * c))).astype(dtype))

        def vector(low: float, high: float, size: int) -> Any:
            return xp.asarray(rng.uniform(low, high, size).astype(wide_dtype(dtype)))

        arrays = {
            "conv1": conv(1, 1, channels, bottleneck),
            "conv2": conv(*ksize, bottleneck, bottleneck),
            "conv3": conv(1, 1, bottleneck, out),
        }
        for number, size in enumerate((channels, bottleneck, bottleneck), 1):
            arrays[f"scale{number}"] = vector(0.5, 1.5, size)
            arrays[f"shift{number}"] = vector(-0.5, 0.5, size)
        return cls(**arrays, project=None if out_channels is None else conv(1, 1, channels, out))


def fold_batch_norm(gamma: Any, beta: Any, mean: Any, var: Any, eps: float) -> tuple[Any, Any]:
    """Scale and shift of a batch norm in inference form: ``gamma*(x - mean)/sqrt(var + eps) + beta = x*scale + shift``.

    Parameters
    ----------
    gamma, beta, mean, var : ndarray, shape (C,)
        Parameters and running statistics, floating.
    eps : float
        Summand of the variance, as in training.

    Returns
    -------
    scale, shift : ndarray, shape (C,)
        Computed in float64; float32, or float64 where `gamma` is float64. ``scale = gamma/sqrt(var + eps)`` and
        ``shift = beta - mean*scale``.

    Raises
    ------
    TypeError, ValueError
        Arrays of different kinds, or of other dtypes or shapes.

    Notes
    -----
    With CuPy arrays, work runs on the current stream, without synchronisation.
    """
    arrays = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
    array_namespace(arrays)
    for name, array in arrays.items():
        check_floating(name, spec_of(array))
        if array.ndim != 1 or array.shape != gamma.shape:
            raise ValueError(f"{name}: expected shape (C,), the same for all four, got {array.shape}")
    gamma64, beta64, mean64, var64 = (array.astype(np.float64) for array in arrays.values())
    scale = gamma64 / (var64 + eps) ** 0.5
    shift = beta64 - mean64 * scale
    dtype = wide_dtype(gamma.dtype)
    return scale.astype(dtype), shift.astype(dtype)


@functools.lru_cache(maxsize=256)
def _check_weights(named: tuple[tuple[str, Spec], ...]) -> None:
    """Raise unless the arrays of a bottleneck fit together."""
    specs = dict(named)
    conv1 = specs["conv1"]
    check_floating("conv1", conv1)
    for name in ("conv1", "conv2", "conv3", "project"):
        spec = specs.get(name, conv1)
        if len(spec.shape) != 4 or min(spec.shape[:2]) < 1:
            raise ValueError(f"{name}: expected shape (kh, kw, C_in, C_out), got {spec.shape}")
        if spec.dtype != conv1.dtype:
            raise TypeError(f"{name}: expected dtype {conv1.dtype} like conv1, got {spec.dtype}")
    for name, before in (("conv2", "conv1"), ("conv3", "conv2")):
        if specs[name].shape[2] != specs[before].shape[3]:
            wanted = f"{specs[before].shape[3]} channels of input, as {before} puts out"
            raise ValueError(f"{name}: expected {wanted}, got shape {specs[name].shape}")
    wanted_shape = (1, 1, conv1.shape[2], specs["conv3"].shape[3])
    if "project" in specs and specs["project"].shape != wanted_shape:
        raise ValueError(f"project: expected shape {wanted_shape}, got {specs['project'].shape}")
    for number in "123":
        channels = specs[f"conv{number}"].shape[2]
        for name in (f"scale{number}", f"shift{number}"):
            check_channels(name, specs.get(name), conv1.dtype, channels, conv1.device)
    for name, spec in named:
        check_place(name, spec, conv1.device)


def convs_of(weights: BottleneckWeights) -> tuple[Any, Any, Any]:
    """Weights of the three convolutions."""
    return weights.conv1, weights.conv2, weights.conv3


def affines_of(weights: BottleneckWeights) -> list[Affine]:
    """What comes before the first convolution, and after each of the three."""
    first = IDENTITY if weights.scale1 is None else Affine(weights.scale1, weights.shift1, True)
    second, third = Affine(weights.scale2, weights.shift2, True), Affine(weights.scale3, weights.shift3, True)
    return [first, second, third, IDENTITY]
