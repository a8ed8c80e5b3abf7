"""How well a mask fits, and how much the masks of one prompt group differ: numpy on packed bits.

Eight pixels share a byte and eight bytes a word, so an overlap is an AND and a bit count per 64 pixels.

The empty-mask convention, the same for Dice and IoU and everywhere in the book: two empty masks agree
perfectly (1.0); exactly one empty mask does not agree at all (0.0). Libraries differ here, and it moves T2.
"""

import numpy as np

from .errors import SettingsError


def pack(masks):
    """bool [..., H, W] -> uint64 [..., N], N = ceil(H * W / 64); the bits past the last pixel are zero."""
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.ndim < 2:
        raise SettingsError(f"pack() got {masks.dtype} {list(masks.shape)}; give it bool [..., H, W], e.g. logits > 0")
    pixels = masks.shape[-2] * masks.shape[-1]
    packed = np.packbits(masks.reshape(*masks.shape[:-2], pixels), axis=-1)  # [..., ceil(H * W / 8)]
    spare = -packed.shape[-1] % 8  # bytes missing to whole words
    if spare:
        packed = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, spare)])
    return packed.view(np.uint64)


def areas(packed):
    """[..., N] -> [...], pixels in each mask."""
    return np.bitwise_count(packed).sum(axis=-1, dtype=np.int64)


def dice(packed_a, packed_b):
    """2 |A and B| / (|A| + |B|), leading axes broadcast: [..., N], [..., N] -> [...]."""
    overlap, total = _overlap(packed_a, packed_b)
    return _ratio(2 * overlap, total)


def iou(packed_a, packed_b):
    """|A and B| / |A or B|, leading axes broadcast: [..., N], [..., N] -> [...]."""
    overlap, total = _overlap(packed_a, packed_b)
    return _ratio(overlap, total - overlap)


def group_agreement(packed):
    """Mean IoU of each mask with the others of its group: [K, N] -> [K]; NaN where there is no other."""
    count = len(packed)
    if count < 2:
        return np.full(count, np.nan)
    # A row at a time: [K, K, N] words at once would be 190 MB for 150 phrasings of a 256 px tile.
    pairwise = np.stack([iou(mask, packed) for mask in packed])  # [K, K], ones on the diagonal
    return (pairwise.sum(axis=1) - 1) / (count - 1)


def flip_share(packed, pixels):
    """Share of the image's `pixels` on which the K decisions are not unanimous: [K, N] -> float."""
    somebody, everybody = np.bitwise_or.reduce(packed), np.bitwise_and.reduce(packed)  # [N] each
    return float(areas(somebody ^ everybody) / pixels)


def majority(packed):
    """The mask of the pixels that more than half of a group mark: [K, N] -> [N]."""
    votes = np.unpackbits(packed.view(np.uint8), axis=-1).sum(axis=0, dtype=np.uint16)  # [64 N]
    return np.packbits(2 * votes > len(packed)).view(np.uint64)


def bootstrap_means(values, n=2000, seed=0):
    """Means over images under resampling of images: [n_images, M] -> [n, M].

    An image without a value (NaN) in a column drops out of that column, as it would from a plain nanmean.
    All columns see the same resamples, so differences between them keep their pairing.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise SettingsError(f"bootstrap_means() got {list(values.shape)}; give it [n_images, M], n_images > 0")
    weights = bootstrap_weights(len(values), n, seed)
    known = ~np.isnan(values)
    sums, counts = weights @ np.where(known, values, 0.0), weights @ known  # [n, M] each
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def bootstrap_weights(units, n=2000, seed=0):
    """How often each of the units is drawn in each of n resamples: [n, units]; every row sums to `units`."""
    chosen = np.random.default_rng(seed).integers(units, size=(n, units))
    chosen += units * np.arange(n)[:, None]  # so that one bincount counts every resample
    return np.bincount(chosen.ravel(), minlength=n * units).reshape(n, units).astype(np.float64)


def two_level_means(values, n=2000, seed=0):
    """Means of [seeds, images] with seeds and images resampled: [n]."""
    weights = [bootstrap_weights(units, n, seed + level) for level, units in enumerate(values.shape)]
    return np.einsum("nr,ni,ri->n", *weights, values) / values.size


def interval(samples, level=0.95):
    """The middle `level` of the samples: [n, ...] -> low [...], high [...]; NaN where every sample is NaN."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    if not np.isnan(samples).any():
        return tuple(np.quantile(samples, tails, axis=0))
    known = ~np.isnan(samples).all(axis=0)  # asked first, because nanquantile warns where nothing is known
    bounds = np.full((2, *known.shape), np.nan)
    if known.any():
        bounds[:, known] = np.nanquantile(samples[:, known], tails, axis=0)
    return tuple(bounds)


def _overlap(packed_a, packed_b):
    """|A and B| and |A| + |B|, both [...]."""
    if packed_a.shape[-1] != packed_b.shape[-1]:
        raise SettingsError(
            f"the masks have {packed_a.shape[-1]} and {packed_b.shape[-1]} words; compare images of one size"
        )
    return areas(packed_a & packed_b), areas(packed_a) + areas(packed_b)


def _ratio(part, whole):
    """part / whole, and 1.0 where both masks are empty."""
    return np.divide(part, whole, out=np.ones(np.broadcast(part, whole).shape), where=whole > 0)
