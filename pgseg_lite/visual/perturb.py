"""Masks, boxes and points, each made worse by degrees: pure functions of prompt, kind, severity and seed.

Severity 0 is the prompt itself, 1 to 10 a radius in voxels, or a number of slices; `KINDS` says what it means for each
kind. A larger one is a larger error, with one exception: `hole` leaves a shell of that thickness, so there a larger
radius is milder. A 2D mask is a volume of one slice, so it has no neighbour to be shifted to or confused with.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import SettingsError

SEVERITIES = tuple(range(1, 11))
CELL = 3  # voxels along an edge of the blocks that make a jagged boundary
STUDY_MIX = 4  # the largest radius at which the published study mixes


@dataclass(frozen=True)
class Kind:
    """`bend(mask [D, H, W], severity, rng, others)` with severity > 0; `of_box` the same for corners [N, 2, 3]."""

    about: str
    bend: object
    of_box: object = None
    of_point: object = None
    milder: bool = False  # with a larger severity


def perturb_mask(mask, kind, severity, seed=0, others=None):
    """A bent copy of a bool mask [H, W] or [D, H, W]; `others`, what the organs around it fill, is for `leak` only."""
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim not in (2, 3):
        raise SettingsError(
            f"perturb_mask() got {mask.dtype} {list(mask.shape)}; give it bool [H, W] or [D, H, W], e.g. labels == 3"
        )
    chosen = check(kind, severity)
    if chosen.bend is leak and others is None:
        raise SettingsError("leak must know where the other organs are; give others=, a bool mask of the same shape")
    if others is not None and (others.dtype != bool or others.shape != mask.shape):
        raise SettingsError(
            f"others is {others.dtype} {list(others.shape)} beside a mask {list(mask.shape)}; give bool of its shape"
        )
    if severity == 0 or not mask.any():
        return mask.copy()
    volume = mask[None] if mask.ndim == 2 else mask  # [D, H, W]
    around = others[None] if others is not None and mask.ndim == 2 else others
    return chosen.bend(volume, severity, np.random.default_rng(seed), around).reshape(mask.shape)


def perturb_boxes(boxes, kind, severity, shape, seed=0):
    """Bent copies of boxes [N, 2, d], first and last voxel along each of the d axes; they stay inside `shape`."""
    boxes = _corners(boxes, shape, "boxes [N, 2, d]", 3)
    chosen = check(kind, severity, "of_box")
    if severity == 0 or not len(boxes):
        return boxes
    low, high = np.moveaxis(boxes, 1, 0)
    if (low > high).any():
        raise SettingsError("a box ends before it begins; give first and last voxel, in this order")
    bent = np.sort(_in_3d(chosen.of_box, boxes, severity, seed, shape), axis=1)  # faces that pass each other swap
    return bent.clip(0, np.array(shape) - 1)


def perturb_points(points, kind, severity, shape, seed=0):
    """Bent copies of points [N, d]; they stay inside `shape`."""
    points = _corners(points, shape, "points [N, d]", 2)
    chosen = check(kind, severity, "of_point")
    if severity == 0 or not len(points):
        return points
    return _in_3d(chosen.of_point, points, severity, seed, shape).clip(0, np.array(shape) - 1)


def check(kind, severity, way="bend"):
    names = [name for name, each in KINDS.items() if getattr(each, way)]
    if kind not in names:
        raise SettingsError(f"kind {kind!r} is not one of those for this prompt; choose from {', '.join(names)}")
    if isinstance(severity, bool) or severity not in (0, *SEVERITIES):
        raise SettingsError(f"severity {severity!r} is none of 0 to {SEVERITIES[-1]}; give a whole number of voxels")
    return KINDS[kind]


def _corners(values, shape, wanted, ndim):
    values = np.array(values, float)
    if values.ndim != ndim or values.shape[-1] != len(shape) or len(shape) not in (2, 3):
        raise SettingsError(f"got {list(values.shape)} for an image {list(shape)}; give {wanted}, d axes as the image")
    return values


def _in_3d(bend, places, severity, seed, shape):
    """As if a 2D image were a volume of one slice, and in its plane as there."""
    missing = 3 - len(shape)
    padded = np.pad(places, [(0, 0)] * (places.ndim - 1) + [(missing, 0)])
    bent = bend(padded, severity, np.random.default_rng(seed), (1,) * missing + tuple(shape))
    return bent[..., missing:]


# ---- the element of all morphology here: a cube of side 2 r + 1 ----


def grown(mask, radius):
    """Every voxel within `radius` of the mask along each axis: a dilation by a cube."""
    return _within_reach(mask, radius, lambda part: _maximum(part, radius))


def shrunk(mask, radius):
    """The voxels whose cube lies in the mask: an erosion. What is outside of the image counts neither way."""
    return _within_reach(mask, 1, lambda part: ~_maximum(~part, radius))


def _within_reach(mask, margin, work):
    """`work` done on the part of the volume that it can change, and nothing elsewhere."""
    out = np.zeros_like(mask)
    if mask.any():
        window = bounds(mask, margin)
        out[window] = work(mask[window])
    return out


def bounds(mask, margin=0):
    """The slices around a mask that is not empty, `margin` voxels wider where the image goes on."""
    window = []
    for axis, size in enumerate(mask.shape):
        found = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        window.append(slice(max(found[0] - margin, 0), min(found[-1] + 1 + margin, size)))
    return tuple(window)


def _maximum(mask, radius):
    """Maximum over a cube, an axis at a time; windows double, so that radius 8 costs five ORs an axis, not sixteen."""
    for axis in range(mask.ndim):
        if mask.shape[axis] == 1:
            continue
        edge = [(radius, radius) if a == axis else (0, 0) for a in range(mask.ndim)]
        rows, width = np.moveaxis(np.pad(mask, edge), axis, 0), 1
        while width < 2 * radius + 1:
            step = min(width, 2 * radius + 1 - width)
            rows, width = rows[:-step] | rows[step:], width + step
        mask = np.moveaxis(rows, 0, axis)
    return mask


# ---- kinds, for masks ----


def dilate(mask, radius, rng=None, others=None):
    return grown(mask, radius)


def erode(mask, radius, rng=None, others=None):
    return shrunk(mask, radius)


def hole(mask, radius, rng=None, others=None):
    return mask & ~shrunk(mask, radius)


def shift(mask, reach, rng, others=None):
    """By -reach..reach along each axis that has more than one slice. What leaves the image is lost."""
    return moved(mask, _steps(reach, rng, mask.shape))


def mix(mask, most, rng, others=None):
    """Dilate, erode, hole or shift, each with 25 %, at a radius of 1 to `most` (the study always shifts by up to 3)."""
    way = (dilate, erode, hole, shift)[rng.integers(4)]
    return way(mask, int(rng.integers(1, most + 1)), rng)


def jagged(mask, reach, rng, others=None):
    """The boundary goes out or in by up to `reach`, a block of voxels at a time."""
    from scipy import ndimage

    out, window = mask.copy(), bounds(mask, reach + 1)
    part = mask[window]
    if part.all():  # no boundary in sight
        return out
    cells = rng.uniform(-reach, reach, [-(-size // CELL) for size in part.shape])
    for axis, size in enumerate(part.shape):
        cells = cells.repeat(CELL, axis).take(range(size), axis)
    inside, outside = (ndimage.distance_transform_edt(side) for side in (part, ~part))
    depth = inside - outside - np.where(part, 0.5, -0.5)  # 0 between the last voxel inside and the first outside
    out[window] = depth + cells > 0
    return out


def missing_slices(mask, tenths, rng, others=None):
    """That many tenths of the slices between the first and the last are empty; more miss the same ones and others."""
    marked = np.flatnonzero(mask.any(axis=(1, 2)))[1:-1]
    out = mask.copy()
    out[rng.permutation(marked)[: round(len(marked) * tenths / 10)]] = False
    return out


def wrong_slice(mask, slices, rng, others=None):
    """The whole mask lies that many slices too high or too low."""
    return moved(mask, (int(rng.choice((-1, 1))) * slices * (len(mask) > 1), 0, 0))


def thick_slices(mask, extra, rng, others=None):
    """Drawn on thick slices: one is drawn, and the next `extra` ones copy it. The first thick slice starts anywhere."""
    at = np.arange(len(mask))
    drawn = at - (at + rng.integers(extra + 1)) % (extra + 1)  # the slice that each one copies
    return mask[drawn.clip(0)]


def leak(mask, reach, rng, others):
    """The mask and what lies within `reach` of it in the other organs, reached through them."""
    window = bounds(mask, reach)
    out, part, open_to = mask.copy(), mask[window], others[window]
    for _ in range(reach):
        part = part | (grown(part, 1) & open_to)
    out[window] = part
    return out


def _steps(reach, rng, shape):
    return rng.integers(-reach, reach + 1, 3) * (np.array(shape) > 1)


def moved(mask, steps):
    out = np.zeros_like(mask)
    pairs = [(slice(max(s, 0), n + min(s, 0)), slice(max(-s, 0), n + min(-s, 0)))
             for n, s in zip(mask.shape, map(int, steps), strict=True)]  # fmt: skip
    if all(abs(s) < n for n, s in zip(mask.shape, steps, strict=True)):
        out[tuple(to for to, _ in pairs)] = mask[tuple(of for _, of in pairs)]
    return out


# ---- the same for boxes [N, 2, 3] and points [N, 3] ----


def _push_faces(sign):
    def push(boxes, radius, rng, shape):
        middle = boxes.mean(axis=1)
        bent = boxes + sign * radius * np.array([[-1], [1]]) * (np.array(shape) > 1)
        if sign < 0:  # a face stops at the middle of its box
            bent[:, 0], bent[:, 1] = np.minimum(bent[:, 0], middle), np.maximum(bent[:, 1], middle)
        return bent

    return push


def _shift_places(places, reach, rng, shape):
    steps = np.stack([_steps(reach, rng, shape) for _ in places])  # [N, 3]
    return places + steps.reshape(len(places), *[1] * (places.ndim - 2), 3)


def _jag_faces(boxes, reach, rng, shape):
    """Each face by itself goes out or in."""
    return boxes + rng.integers(-reach, reach + 1, boxes.shape) * (np.array(shape) > 1)


def _mix_boxes(boxes, most, rng, shape):
    bent = []
    for box in boxes[:, None]:
        way = (KINDS["dilate"], KINDS["erode"], KINDS["shift"])[rng.integers(3)].of_box  # a box has no hole
        bent.append(way(box, int(rng.integers(1, most + 1)), rng, shape))
    return np.concatenate(bent)


def _wrong_slice_places(places, slices, rng, shape):
    way = rng.choice((-1, 1), len(places)) * slices * (shape[0] > 1)
    return places + way.reshape(-1, *[1] * (places.ndim - 1)) * np.array([1, 0, 0])


def _thick_places(places, extra, rng, shape):
    first = rng.integers(extra + 1)
    bent = places.copy()
    bent[..., 0] = (places[..., 0] + first) // (extra + 1) * (extra + 1) - first
    return bent if shape[0] > 1 else places


KINDS = {
    "dilate": Kind("every voxel within the radius is marked too", dilate, _push_faces(1)),
    "erode": Kind("only voxels that are further than the radius from the outside stay", erode, _push_faces(-1)),
    "hole": Kind("a shell as thick as the radius is left", hole, milder=True),
    "shift": Kind("moved by up to the radius along each axis", shift, _shift_places, _shift_places),
    "mix": Kind("dilate, erode, hole or shift, at a radius of up to the severity", mix, _mix_boxes),
    "jagged": Kind("the boundary goes out and in by up to the radius", jagged, _jag_faces),
    "missing slices": Kind("a tenth of the inner slices for each degree is left out", missing_slices),
    "wrong slice": Kind("that many slices too high or too low", wrong_slice, _wrong_slice_places, _wrong_slice_places),
    "thick slices": Kind("a slice is drawn, that many more copy it", thick_slices, _thick_places, _thick_places),
    "leak": Kind("runs into the neighbouring organs by the radius", leak),
}
