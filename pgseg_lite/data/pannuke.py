"""PanNuke: 7,901 patches of 256 px, 19 tissues, 40x, five nucleus classes; the splits are its three folds.

The official files are `Fold 1/images/fold1/images.npy` and `Fold 1/masks/fold1/masks.npy`, [N, 256, 256, 6] with
instance ids in channels neoplastic, inflammatory, connective, dead, epithelial, background (not read). They are
memory-mapped: 10 GB are never in memory at once. With `hub=True` the same patches come from the Hugging Face set
RationAI/PanNuke. A `root` that holds a copy of it made by `save_to_disk` is read as such.
CC BY-NC-SA 4.0. Gamper et al., PanNuke, ECDP 2019; Gamper et al., arXiv:2003.10778, 2020.
"""

from functools import partial
from pathlib import Path

import numpy as np

from ..errors import DataError
from .dataset import Sample
from .files import layer, subfolder

TARGETS = ("all", "neoplastic", "inflammatory", "connective", "dead", "epithelial")
SIDE = 256
HUB = {"path": "RationAI/PanNuke", "revision": "1f498f7bd6a85ef5f204c592b41ac881eab61005"}
HUB_COPY = "dataset_dict.json"  # what `save_to_disk` leaves at the top


class PanNuke:
    """A fold as a source; `patch(index)` gives an image [256, 256, 3] and (target, bool [256, 256]) of each nucleus."""

    name, targets = "pannuke", TARGETS

    def __init__(self, split: str, count: int, patch):
        self.ids, self.patch = {f"{split}_{index:04d}": index for index in range(count)}, patch

    def shape(self, id: str) -> tuple[int, int]:
        return SIDE, SIDE

    def read(self, id: str) -> Sample:
        image, nuclei = self.patch(self.ids[id])
        masks, instances = layer((SIDE, SIDE), TARGETS, nuclei)
        return Sample(image, masks, id, self.name, instances)


def open_pannuke(name: str, root: Path | None, split: str, hub: bool) -> PanNuke:
    if hub or (root / HUB_COPY).is_file():
        rows = hub_rows(root, split)
        return PanNuke(split, len(rows), partial(from_hub, rows))
    folders = {kind: subfolder(root, f"Fold {split[-1]}/{kind}/{split}") for kind in ("images", "masks")}
    images, masks = (folder / f"{kind}.npy" for kind, folder in folders.items())
    count = len(mapped(images))
    for path, channels in ((images, 3), (masks, 6)):
        shape, wanted = mapped(path).shape, (count, SIDE, SIDE, channels)
        if shape != wanted:
            raise DataError(f"{path}: has shape {shape} and not {wanted}; fetch this fold again")
    return PanNuke(split, count, partial(from_fold, images, masks))


def from_fold(images: Path, masks: Path, index: int):
    """A patch of the official files; paths, not arrays, so that the source travels to worker processes."""
    image = mapped(images)[index].astype(np.uint8)  # [256, 256, 3], in the official files float64 from 0 to 255
    layers = zip(TARGETS[1:], np.moveaxis(mapped(masks)[index], -1, 0), strict=False)  # all but the background
    return image, [(target, ids == number) for target, ids in layers for number in np.unique(ids[ids > 0])]


def mapped(path: Path) -> np.ndarray:
    """The file as an array that stays on disk; nothing pickled is ever loaded."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: truncated or no plain .npy file ({error}); fetch it again") from error


def hub_rows(root, split: str):
    """A fold as a `datasets.Dataset` with columns image, instances (binary masks), categories (in TARGETS' order)."""
    try:
        import datasets

        fold = datasets.load_from_disk(root)[split] if root else datasets.load_dataset(**HUB, split=split)
        return fold.select_columns(["image", "instances", "categories"])
    except Exception as error:  # no package, no network, another format: each raises its own class
        where = f"{root or HUB['path']}: {split}"
        raise DataError(f"{where} cannot be used ({error}); check it, the network and the package") from error


def from_hub(rows, index: int):
    row = rows[index]
    pairs = zip(row["categories"], row["instances"], strict=True)
    nuclei = [(TARGETS[1 + category], np.asarray(mask, bool)) for category, mask in pairs]
    return np.array(row["image"].convert("RGB")), nuclei
