"""Pictures from files, of any kind that scikit-image reads, as RGB in 256 levels."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ._demo_errors import DemoError, MissingDependency, brief

Array = np.ndarray[Any, Any]

#: The Hubble deep field, from scikit-image's wheel: galaxies in some of the blocks, dark sky in most.
DEFAULT_IMAGE = "hubble_deep_field.jpg"


def load_picture(path: Path | None) -> tuple[str, Array]:
    """Name and pixels (uint8 ``[H, W, 3]``) of the image at `path`, or of the default picture."""
    if path is not None and not os.path.isfile(path):
        kind = "the directory " if os.path.isdir(path) else "no file: "
        raise DemoError(f"--image: expected an image file, got {kind}{str(path)!r}")
    try:
        import skimage
        from skimage.io import imread
    except ImportError as error:
        raise MissingDependency.of("scikit-image", error) from error
    if path is None:
        path = Path(skimage.__file__).parent / "data" / DEFAULT_IMAGE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata and large files; the pixels are what counts
            raw = np.asarray(imread(path))
        if raw.ndim == 3 and raw.shape[2] == 4 and path.suffix.lower() in (".jpg", ".jpeg"):
            raw = cmyk_to_rgb(raw)  # JPEG has no alpha
        return path.name, to_rgb(raw)
    except Exception as error:  # each decoder raises its own kinds
        raise DemoError(f"--image: expected a readable image, got {str(path)!r}: {brief(error)}") from error


def cmyk_to_rgb(raw: Array) -> Array:
    """Inks (uint8 ``[H, W, 4]``: cyan, magenta, yellow, black) as uint8 ``[H, W, 3]`` on white paper."""
    light = 255 - raw.astype(np.uint32)
    return (light[:, :, :3] * light[:, :, 3:] // 255).astype(np.uint8)


def to_rgb(raw: Array) -> Array:
    """Decoded image of any kind as uint8 ``[H, W, 3]``: the first frame, without alpha."""
    while raw.ndim > 3 or (raw.ndim == 3 and raw.shape[2] > 4):
        raw = raw[0]
    if raw.ndim not in (2, 3) or raw.size == 0:
        raise ValueError(f"no picture in an array of shape {raw.shape}")
    levels = to_levels(raw)
    if levels.ndim == 3 and levels.shape[2] >= 3:
        return np.ascontiguousarray(levels[:, :, :3])
    gray = levels if levels.ndim == 2 else levels[:, :, 0]
    return np.repeat(gray[:, :, np.newaxis], 3, axis=2)


def to_levels(raw: Array) -> Array:
    """`raw` in 256 levels. Signed and floating images have no fixed white: their range is stretched."""
    if raw.dtype.kind == "b":
        levels = raw.astype(np.uint8) * np.uint8(255)
    elif raw.dtype.kind == "u":
        levels = raw >> (8 * raw.dtype.itemsize - 8)
    else:
        finite = np.nan_to_num(raw.astype(np.float64), posinf=0, neginf=0)
        low, high = finite.min(), finite.max()
        levels = (finite - low) * (255 / (high - low) if high > low else 0)
    return levels.astype(np.uint8)
