"""Synthetic abdomens: six organs that touch, with the contrast, blur and noise of a CT, from a seed.

They stand in for real scans where a reader has none. A phantom is far easier than a patient: organs are bent ellipsoids
and lie where they belong. What it keeps is what matters for a prompt: neighbours of nearly the same grey value, borders
that noise hides, organs large and small.
"""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from ..errors import SettingsError

SHAPE = (32, 48, 48)  # slices, rows, columns
# Centre and half-axes as shares of the volume; mean and spread of the grey value in Hounsfield units, venous phase.
ORGANS = {
    "liver": ((0.42, 0.40, 0.30), (0.32, 0.24, 0.20), 110, 12),
    "spleen": ((0.40, 0.60, 0.80), (0.22, 0.13, 0.09), 118, 12),
    "left kidney": ((0.60, 0.68, 0.65), (0.22, 0.09, 0.08), 165, 20),
    "right kidney": ((0.64, 0.68, 0.34), (0.22, 0.09, 0.08), 165, 20),
    "stomach": ((0.36, 0.36, 0.62), (0.18, 0.12, 0.13), 55, 15),
    "aorta": ((0.50, 0.60, 0.50), (9.00, 0.055, 0.055), 150, 20),
}
FAT, MUSCLE, BOWEL, BONE, AIR = -100, 55, 35, 350, -1000
WINDOW = (-160, 240)  # of grey values, for abdomens


@dataclass(frozen=True)
class Volume:
    """A phantom, or a scan of one's own."""

    name: str
    image: np.ndarray  # float32 [D, H, W], Hounsfield units
    labels: np.ndarray  # integers [D, H, W], 0 for none, then the organs in order
    organs: tuple = tuple(ORGANS)

    def mask(self, organ):
        return self.labels == 1 + self.organs.index(organ)

    def others(self, organ):
        """Where the other organs are."""
        return (self.labels > 0) & ~self.mask(organ)

    @property
    def windowed(self):
        """float32 [D, H, W] in -1..1."""
        low, high = WINDOW
        return (np.clip(self.image, low, high) - low) / (high - low) * 2 - 1


def make_phantom(seed, split="train", shape=SHAPE):
    """The phantom of this seed; train and test have no phantom in common."""
    from scipy.ndimage import gaussian_filter

    if split not in ("train", "test"):
        raise SettingsError(f"phantoms have no split {split!r}; choose train or test")
    if len(shape) != 3 or min(shape) < 16:
        raise SettingsError(f"a phantom of {list(shape)} has no room for six organs; give at least 16 voxels an axis")
    rng = np.random.default_rng([split == "test", seed])
    at = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij"))  # [3, D, H, W], shares

    def smooth(voxels):
        field = gaussian_filter(rng.standard_normal(shape), voxels)
        return field / field.std()

    def ellipsoid(centre, axes, bent=0.0):
        """Above 0 inside; bent by a smooth field, so that no two organs have one shape."""
        away = sum(((x - c) / a) ** 2 for x, c, a in zip(at, centre, axes, strict=True))
        return 1 - away + (bent * smooth(3) if bent else 0)

    body, wall = (ellipsoid((0.5, 0.52, 0.5), (9, a, 1.15 * a)) > 0 for a in (0.42, 0.36))
    image = np.where(body, MUSCLE, AIR).astype(np.float32)
    image[wall] = np.where(smooth(1.5) > 0.3, BOWEL, FAT)[wall]  # loops of bowel in fat
    image[ellipsoid((0.5, 0.76, 0.5), (9, 0.09, 0.10)) > 0] = BONE
    labels = np.zeros(shape, np.uint8)
    for number, (centre, axes, mean, spread) in enumerate(ORGANS.values(), 1):
        grey, size = rng.normal(mean, spread), rng.uniform(0.85, 1.15, 3)
        inside = ellipsoid(centre + rng.normal(0, 0.02, 3), axes * size, bent=0.18) > 0
        inside &= wall & (labels == 0)  # the first of two neighbours has the place
        labels[largest(inside)] = number
        image[labels == number] = grey
    image = gaussian_filter(image, 0.6)  # partial volume
    noise = gaussian_filter(rng.standard_normal(shape), 0.7)
    image += rng.uniform(18, 35) * noise / noise.std()  # reconstruction leaves noise that hangs together
    return Volume(f"{split} {seed}", image.astype(np.float32), labels)


def largest(mask):
    """The largest piece of a mask: a bent border leaves crumbs."""
    from scipy import ndimage

    pieces, count = ndimage.label(mask)
    return mask if count < 2 else pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()


def make_phantoms(count, split="train", shape=SHAPE):
    return [make_phantom(seed, split, shape) for seed in range(count)]


def about(phantoms, split):
    """For a stamp: which phantoms these are. Labels only: the last bit of a filter may depend on the machine."""
    digest = sha256(b"".join(phantom.labels.tobytes() for phantom in phantoms)).hexdigest()[:12]
    return dict(name="phantoms", split=split, digest=digest, volumes=len(phantoms))
