"""Masks of one image, on the host: float32 ``[1, H, W]``, 1 where the image matters and 0 elsewhere."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def top_left_mask(height: int, width: int, sparsity: float) -> Array:
    """The benchmark mask of the 2018 paper: a rectangle in the top left corner, of the image's proportions.

    It takes the part ``1 - sparsity`` of the image's area, its sides rounded up to whole pixels.
    """
    side = math.sqrt(1 - sparsity)
    mask = np.zeros((1, height, width), np.float32)
    # Rounded first: the root of 0.25, for one, times an even height should be no pixel too long.
    mask[:, : math.ceil(round(side * height, 6)), : math.ceil(round(side * width, 6))] = 1
    return mask


def road_mask(height: int, width: int) -> Array:
    """Roads as a map seen from above shows them: one that winds from left to right, and others that meet it.

    About a quarter of the pixels, as of the paper's road map. Widths and bends are parts of the image's height.
    """
    y = ((np.arange(height) + 0.5) / height)[:, None]
    x = ((np.arange(width) + 0.5) / height)[None, :]
    span = width / height
    turn = 2 * np.pi * x / span
    highway = np.abs(y - 0.5 - 0.16 * np.sin(turn) - 0.05 * np.sin(3 * turn)) < 0.055
    avenue = np.abs(x - 0.3 * span - 0.10 * np.sin(5 * y)) < 0.042
    diagonal = np.abs(x - 0.62 * span - 0.55 * (y - 0.5)) < 0.042
    street = (np.abs(y - 0.14 - 0.04 * x) < 0.021) & (x > 0.3 * span)
    lane = (np.abs(y - 0.86 + 0.03 * x) < 0.021) & (x < 0.8 * span)
    return (highway | avenue | diagonal | street | lane)[np.newaxis].astype(np.float32)


def vessel_mask(height: int, width: int) -> Array:
    """The blood vessels of the photograph of a retina that comes with scikit-image.

    A vessel's pixel is darker in green than its surroundings by more than a threshold. The photograph is cropped to the
    proportions of the mask, and a pixel of the mask is set where any pixel of the photograph in it is.

    Raises ImportError without scikit-image.
    """
    vessels = _retina_vessels()
    side = vessels.shape[0]
    # The largest rectangle of the wanted proportions, around the middle.
    rows, columns = (side * min(1.0, extent / other) for extent, other in ((height, width), (width, height)))
    top, left = (side - rows) / 2, (side - columns) / 2
    ys, xs = np.nonzero(vessels)
    rows_of = np.floor((ys - top) * height / rows).astype(int)
    columns_of = np.floor((xs - left) * width / columns).astype(int)
    inside = (rows_of >= 0) & (rows_of < height) & (columns_of >= 0) & (columns_of < width)
    mask = np.zeros((1, height, width), np.float32)
    mask[0, rows_of[inside], columns_of[inside]] = 1
    return mask


#: Half of the window in pixels whose mean a pixel is compared with: vessels of the photograph are up to 20 wide.
_SURROUNDINGS = 20
#: Levels of green, of 256, by which a vessel is darker than its surroundings.
_VESSEL_CONTRAST = 12


@functools.cache
def _retina_vessels() -> Array:
    """Which pixels of the photograph are vessels: bool, 1411 x 1411."""
    from skimage import data

    green = data.retina()[:, :, 1].astype(np.float64)
    size = green.shape[0]
    total = np.zeros((size + 1, size + 1))
    total[1:, 1:] = green.cumsum(0).cumsum(1)
    place = np.arange(size)
    low, high = np.maximum(place - _SURROUNDINGS, 0), np.minimum(place + _SURROUNDINGS + 1, size)
    sums = (total[high] - total[low])[:, high] - (total[high] - total[low])[:, low]
    mean = sums / ((high - low)[:, None] * (high - low)[None, :])
    # Outside of the eye the photograph is black, and at its rim everything is darker than the mean of the inside.
    from_middle = (place - size / 2) ** 2
    inside = from_middle[:, None] + from_middle[None, :] < (0.46 * size) ** 2
    vessels: Array = inside & (mean - green > _VESSEL_CONTRAST)
    return vessels
