"""How well a 3D mask fits: Dice and surface distance, and what counts where a mask is empty.

The convention, the same everywhere in the book: two empty masks agree perfectly (Dice 1, distance 0). Exactly one empty
mask does not agree at all: Dice 0, and the distance is the longest that the volume has, from corner to corner. Leaving
such cases out would reward a model for answering nothing.
"""

import numpy as np

from ..errors import SettingsError
from .perturb import bounds


def overlap(mask, truth):
    """Dice of two bool masks."""
    total = np.count_nonzero(mask) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(mask & truth) / total if total else 1.0


def surface_distance(mask, truth, spacing=None):
    """The mean distance from each surface to the other, both ways; in voxels, or in the unit of `spacing`."""
    from scipy.ndimage import distance_transform_edt

    if mask.shape != truth.shape or mask.dtype != bool or truth.dtype != bool:
        raise SettingsError(
            f"a mask {mask.dtype} {list(mask.shape)} beside a truth {truth.dtype} {list(truth.shape)}; give bool alike"
        )
    step = np.ones(mask.ndim) if spacing is None else np.asarray(spacing, float)
    if step.shape != (mask.ndim,) or (step <= 0).any():
        raise SettingsError(f"spacing {spacing!r} does not fit {mask.ndim} axes; give a positive length for each")
    if not mask.any() or not truth.any():
        return 0.0 if mask.any() == truth.any() else float(np.linalg.norm(step * (np.array(mask.shape) - 1)))
    window = bounds(mask | truth, 1)
    surfaces = [border(side[window]) for side in (mask, truth)]
    away = [distance_transform_edt(~side, step) for side in surfaces]
    return float(np.concatenate([away[1][surfaces[0]], away[0][surfaces[1]]]).mean())


def border(mask):
    """The voxels of a mask that share a face with what is outside of it, or of the image."""
    inner, padded = mask.copy(), np.pad(mask, 1)
    core = tuple(slice(1, -1) for _ in mask.shape)
    for axis in range(mask.ndim):
        if mask.shape[axis] > 1:  # a plane has a rim and no faces
            for way in (-1, 1):
                inner &= np.roll(padded, way, axis)[core]
    return mask & ~inner
