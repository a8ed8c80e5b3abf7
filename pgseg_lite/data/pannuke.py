"""PanNuke: 7,901 patches of 256 px, 19 tissues, 40x, five nucleus classes; the splits are its three folds.

The official files are `Fold 1/images/fold1/images.npy` and `Fold 1/masks/fold1/masks.npy`, [N, 256, 256, 6]
with instance ids in channels neoplastic, inflammatory, connective, dead, epithelial, background (not read).
They are memory-mapped: 10 GB are never in memory at once. With `hub=True` the same patches come from the
Hugging Face set RationAI/PanNuke, or from `root` when that is a copy of it made by `save_to_disk`.
CC BY-NC-SA 4.0. Gamper et al., PanNuke, ECDP 2019; Gamper et al., arXiv:2003.10778, 2020.
"""

from functools import partial
from pathlib import Path

import numpy as np

from ..errors import DataError
from .dataset import Source, layer
from .files import subfolder

TARGETS = ("all", "neoplastic", "inflammatory", "connective", "dead", "epithelial")
SIDE = 256
HUB = {"path": "RationAI/PanNuke", "revision": "1f498f7bd6a85ef5f204c592b41ac881eab61005"}


def open_pannuke(name: str, root: Path | None, split: str, hub: bool) -> Source:
    if hub:
        rows = hub_rows(root, split)
        return _source(name, split, len(rows), partial(from_hub, rows))
    here = f"Fold {split[-1]}"
    images = subfolder(root, f"{here}/images/{split}") / "images.npy"
    masks = subfolder(root, f"{here}/masks/{split}") / "masks.npy"
    count = len(mapped(images))
    for path, channels in ((images, 3), (masks, 6)):
        shape, wanted = mapped(path).shape, (count, SIDE, SIDE, channels)
        if shape != wanted:
            raise DataError(f"{path}: has shape {shape} and not {wanted}; fetch this fold again")
    return _source(name, split, count, partial(from_fold, images, masks))


def _source(name, split, count, load):
    if not count:
        raise DataError(f"{name}: {split} is empty; fetch this fold again")
    return Source(name, TARGETS, {f"{split}_{index:04d}": index for index in range(count)}, _size, load)


def _size(index):
    return SIDE, SIDE


def from_fold(images: Path, masks: Path, index: int):
    """One patch of the official files; paths, not arrays, so that the source travels to worker processes."""
    image = np.array(mapped(images)[index])  # [256, 256, 3], in the official files float64 from 0 to 255
    low, high = image.min(), image.max()
    if low < 0 or high > 255 or (image.dtype.kind == "f" and 0 < high <= 1):
        raise DataError(f"{images}: image {index} is from {low} to {high} and not 0 to 255; fetch it again")
    channels = np.moveaxis(mapped(masks)[index], -1, 0)  # [6, 256, 256], the background last
    layers = zip(TARGETS[1:], channels, strict=False)
    nuclei = [(target, ids == number) for target, ids in layers for number in np.unique(ids[ids > 0])]
    return image.astype(np.uint8), *layer((SIDE, SIDE), TARGETS, nuclei)


def mapped(path: Path) -> np.ndarray:
    """The file as an array that stays on disk; nothing pickled is ever loaded."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: truncated or no plain .npy file ({error}); fetch it again") from error


def hub_rows(root, split: str):
    """One fold as a `datasets.Dataset` with columns image, instances (binary masks), categories."""
    try:
        import datasets

        fold = datasets.load_from_disk(root)[split] if root else datasets.load_dataset(**HUB, split=split)
        fold = fold.select_columns(["image", "instances", "categories"])
        names = [name.lower() for name in fold.features["categories"].feature.names]
        if names != [*TARGETS[1:]]:
            raise ValueError(f"its classes are {', '.join(names)}")
        return fold
    except Exception as error:  # no package, no network, another format: each raises its own class
        where = f"{root or HUB['path']}: {split}"
        raise DataError(f"{where} cannot be used ({error}); check it, the network and the package") from error


def from_hub(rows, index: int):
    row = rows[index]
    pairs = zip(row["categories"], row["instances"], strict=True)
    nuclei = [(TARGETS[1 + category], np.asarray(mask, bool)) for category, mask in pairs]
    return np.array(row["image"].convert("RGB")), *layer((SIDE, SIDE), TARGETS, nuclei)
