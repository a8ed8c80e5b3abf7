"""A dataset is a source of whole images, cut into tiles and narrowed to a hashed, reproducible subset.

A source is any object with name, targets, ids, shape(id) -> (H, W), from a header at most, and read(id) -> Sample.
"""

import copy
import hashlib
import json
import re
from dataclasses import dataclass

import numpy as np

from ..errors import DataError

CACHE_BYTES = 2**30  # whole images kept in memory, per process: each DataLoader worker has its own cache


@dataclass
class Sample:
    image: np.ndarray  # uint8 [H, W, 3]
    masks: dict[str, np.ndarray]  # target -> bool [H, W]; "all" is always there, first, and covers every category
    id: str
    dataset: str
    instances: np.ndarray | None = None  # int32 [H, W], 0 is background; None where nuclei are not told apart

    @property
    def nbytes(self) -> int:
        arrays = (self.image, *self.masks.values(), self.instances)
        return sum(array.nbytes for array in arrays if array is not None)


def source_of(id: str) -> str:
    """The image that a tile was cut from; an image's own name may have an @ in it."""
    return re.sub(r"@\d+,\d+$", "", id)


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along one side: 1000 px at 256 gives 0, 256, 512, 744. The last tile is shifted back to end
    with the image; a side shorter than a tile gives one short tile, since padding would count as truth."""
    return [*range(0, length - tile, tile), max(0, length - tile)]


def pick(ids, fraction: float, seed) -> list[str]:
    """round(fraction * n) of the ids, at least one, in their old order; what 0.1 picks, 0.2 picks too.
    Chosen by the sha256 of "seed:id", so that the choice hangs on no library's random numbers."""
    ranked = sorted(ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    chosen = set(ranked[: max(1, round(fraction * len(ranked)))])
    return [name for name in ids if name in chosen]


class Dataset:
    """Samples by index. `tile=None` gives whole images, else tiles named `image@y,x` (an image that is one tile
    keeps its plain name). `fraction` and `seed` choose among the samples: tiles, or whole images."""

    def __init__(self, source, split: str, tile: int | None = None, fraction=1.0, seed=0, options=None):
        self.source, self.name, self.targets = source, source.name, tuple(source.targets)
        self.split, self.tile, self.fraction, self.seed = split, tile, fraction, seed
        self.options = options or {}  # what else changes the data, e.g. a domain shift: part of the digest
        self._places, self._cache, self._cached_bytes = {}, {}, 0  # sample id -> (image id, window)
        for image in source.ids:
            height, width = source.shape(image)
            side = tile or max(height, width)
            corners = [(y, x) for y in tile_starts(height, side) for x in tile_starts(width, side)]
            for y, x in corners:
                name = f"{image}@{y},{x}" if len(corners) > 1 else image
                self._places[name] = (image, np.s_[y : y + side, x : x + side])
        self.ids = tuple(pick(self._places, fraction, seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        image, window = self._places[self.ids[index]]
        whole = self._read(image)
        # copies: whoever augments a sample in place must not change the cached image
        masks = {target: mask[window].copy() for target, mask in whole.masks.items()}
        instances = None if whole.instances is None else whole.instances[window].copy()
        return Sample(whole.image[window].copy(), masks, self.ids[index], self.name, instances)

    def _read(self, image: str) -> Sample:
        if image not in self._cache:
            self._cache[image] = self.source.read(image)
            self._cached_bytes += self._cache[image].nbytes
            while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:  # the oldest goes first
                self._cached_bytes -= self._cache.pop(next(iter(self._cache))).nbytes
        return self._cache[image]

    @property
    def digest(self) -> str:
        """12 hex digits that stand for exactly these samples: name, split, tile, ids, and options if any."""
        content = [self.name, self.split, self.tile, list(self.ids)] + [self.options] * bool(self.options)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def manifest(self) -> dict:
        """Everything needed to say which samples these are; ready for JSON."""
        said = {key: getattr(self, key) for key in ("name", "split", "tile", "fraction", "seed", "options")}
        return said | {"n": len(self), "digest": self.digest, "ids": list(self.ids)}

    def hold_out(self, fraction, seed=0):
        """(rest, held), divided by source image: tiles of one image look alike and overlap, so it is never on both."""
        images = list(dict.fromkeys(self._places[name][0] for name in self.ids))
        if not 0 < fraction < 1 or len(images) < 2:
            raise DataError(f"cannot hold out {fraction!r} of {len(images)} images; use a share below 1 of two or more")
        taken, rest, held = set(pick(images, fraction, seed)[: len(images) - 1]), copy.copy(self), copy.copy(self)
        rest.ids = tuple(name for name in self.ids if self._places[name][0] not in taken)
        held.ids = tuple(name for name in self.ids if self._places[name][0] in taken)
        return rest, held

    def __repr__(self):
        size = f"{self.tile} px tiles" if self.tile else "whole images"
        return f"<{self.name} {self.split}: {len(self)} {size}, {self.digest}>"
