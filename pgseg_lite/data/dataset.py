"""A dataset is a source of whole images, cut into tiles and narrowed to a hashed, reproducible subset."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import DataError

CACHE_BYTES = 2**30  # whole images kept in memory, per process: each DataLoader worker has its own cache


@dataclass
class Sample:
    image: np.ndarray  # uint8 [H, W, 3]
    masks: dict[str, np.ndarray]  # target -> bool [H, W]; "all" is always there and covers every category
    id: str
    dataset: str
    instances: np.ndarray | None = None  # int32 [H, W], 0 is background; None where nuclei are not told apart


class Source:
    """Whole images by id. `size(item)` gives (H, W), from a header at most; `load(item)` gives (image, masks,
    instances). Any object with name, targets, ids, shape() and read() will do in its place."""

    def __init__(self, name: str, targets: tuple[str, ...], items: dict, size: Callable, load: Callable):
        self.name, self.targets, self.ids = name, targets, list(items)
        self.items, self.size, self.load = items, size, load

    def shape(self, name: str) -> tuple[int, int]:
        return self.size(self.items[name])

    def read(self, name: str) -> Sample:
        image, masks, instances = self.load(self.items[name])
        return Sample(image, {target: masks[target] for target in self.targets}, name, self.name, instances)


def layer(shape, targets, nuclei) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(masks, instances) from (target, bool [H, W]) of each nucleus. Where two overlap, the masks keep both
    and the instance map the first."""
    masks, instances = {target: np.zeros(shape, bool) for target in targets}, np.zeros(shape, np.int32)
    for number, (target, mask) in enumerate(nuclei, start=1):
        masks[target] |= mask
        masks["all"] |= mask
        instances[mask & (instances == 0)] = number
    return masks, instances


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along one side: 1000 px at 256 gives 0, 256, 512, 744. The last tile is shifted back
    to end with the image, so it overlaps its neighbour; a side shorter than a tile gives one tile as long as
    itself: nothing is padded, since padding would count as truth."""
    return [*range(0, length - tile, tile), max(0, length - tile)]


def pick(ids, fraction: float, seed) -> list[str]:
    """round(fraction * n) of the ids, at least one, in their old order; what 0.1 picks, 0.2 picks too.
    Chosen by the sha256 of "seed:id", so that the choice hangs on no library's random numbers."""
    ranked = sorted(ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    chosen = set(ranked[: max(1, round(fraction * len(ranked)))])
    return [name for name in ids if name in chosen]


class Dataset:
    """Samples by index. `tile=None` gives whole images, else tiles named `image@y,x` (an image that is one
    tile keeps its plain name). `fraction` and `seed` choose among the samples: tiles, or whole images."""

    def __init__(self, source, split: str, tile: int | None = None, fraction=1.0, seed=0, options=None):
        self.source, self.name, self.targets = source, source.name, tuple(source.targets)
        self.split, self.tile, self.fraction, self.seed = split, tile, fraction, seed
        self.options = options or {}  # what else changes the data, e.g. a domain shift: part of the digest
        self._places = {}  # sample id -> (image id, y, x)
        for image in source.ids:
            rows, columns = [tile_starts(side, tile) for side in source.shape(image)] if tile else ([0], [0])
            for y, x in [(y, x) for y in rows for x in columns]:
                name = f"{image}@{y},{x}" if len(rows) * len(columns) > 1 else image
                self._places[name] = (image, y, x)
        self._keep(pick(list(self._places), fraction, seed))

    def _keep(self, ids):
        self.ids, self._cache, self._cached_bytes, self._last = tuple(ids), {}, 0, None
        return self

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        image, y, x = self._places[self.ids[index]]
        whole = self._read(image)
        window = np.s_[y : y + self.tile, x : x + self.tile] if self.tile else np.s_[:, :]
        # copies: whoever augments a sample in place must not change the cached image
        masks = {target: mask[window].copy() for target, mask in whole.masks.items()}
        instances = None if whole.instances is None else whole.instances[window].copy()
        return Sample(whole.image[window].copy(), masks, self.ids[index], self.name, instances)

    def _read(self, image: str) -> Sample:
        if self._last is None or self._last.id != image:
            self._last = self._cache.get(image) or self.source.read(image)
            arrays = [self._last.image, *self._last.masks.values(), self._last.instances]
            size = sum(array.nbytes for array in arrays if array is not None)
            if image not in self._cache and self._cached_bytes + size <= CACHE_BYTES:
                self._cache[image] = self._last
                self._cached_bytes += size
        return self._last  # past the budget only the latest image is kept, for tiles read in order

    @property
    def images(self) -> tuple[str, ...]:
        """The ids of the source images that the samples come from."""
        return tuple(dict.fromkeys(self._places[name][0] for name in self.ids))

    @property
    def digest(self) -> str:
        """12 hex digits that stand for exactly these samples: name, split, tile, ids, and options if any."""
        content = [self.name, self.split, self.tile, list(self.ids)] + [self.options] * bool(self.options)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def manifest(self) -> dict:
        """Everything needed to say which samples these are; ready for JSON."""
        said = {key: getattr(self, key) for key in ("name", "split", "tile", "fraction", "seed", "options")}
        return said | {"n": len(self), "digest": self.digest, "ids": list(self.ids)}

    def hold_out(self, fraction: float, seed=0) -> tuple["Dataset", "Dataset"]:
        """(rest, held): all samples of a share of the source images go to `held`; each side gets an image.
        By image, because tiles of one image look alike and overlap: on both sides they would leak."""
        if not 0 < fraction < 1:
            raise DataError(f"the share to hold out is {fraction!r}; give a number between 0 and 1")
        if len(self.images) < 2:
            raise DataError(f"{self}: one image cannot be divided without a leak; use more images")
        taken = set(pick(self.images, fraction, f"held:{seed}")[: len(self.images) - 1])
        held = [name for name in self.ids if self._places[name][0] in taken]
        rest = [name for name in self.ids if self._places[name][0] not in taken]
        return copy.copy(self)._keep(rest), copy.copy(self)._keep(held)

    def __repr__(self):
        size = f"{self.tile} px tiles" if self.tile else "whole images"
        return f"<{self.name} {self.split}: {len(self)} {size} of {len(self.images)} images, {self.digest}>"
