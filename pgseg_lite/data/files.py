"""Finding and reading image and label files, and refusing what could be meant in two ways."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from .dataset import Sample

MASKS = (".png", ".tif", ".tiff", ".bmp")  # no .jpg: its compression invents labels
IMAGES = (*MASKS, ".jpg", ".jpeg")


class FileSource:
    """Image files, each with its labels; `decode(labels, image path, (H, W))` gives (masks, instances or None)."""

    def __init__(self, name: str, targets: tuple[str, ...], files: dict[str, tuple], decode):
        self.name, self.targets, self.decode = name, targets, decode
        self.ids = files  # id -> (image path, labels)

    def shape(self, id: str) -> tuple[int, int]:
        with opened(self.ids[id][0]) as image:
            return image.height, image.width

    def read(self, id: str) -> Sample:
        path, labels = self.ids[id]
        image = read_image(path)  # [H, W, 3]
        masks, instances = self.decode(labels, path, image.shape[:2])
        return Sample(image, {target: masks[target] for target in self.targets}, id, self.name, instances)


def layer(shape, targets, nuclei) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(masks, instances) from (target, bool [H, W]) of each nucleus. Where two overlap, the masks keep both and the
    instance map the first."""
    masks, instances = {target: np.zeros(shape, bool) for target in targets}, np.zeros(shape, np.int32)
    for number, (target, mask) in enumerate(nuclei, start=1):
        masks[target] |= mask
        masks["all"] |= mask
        instances[mask & (instances == 0)] = number
    return masks, instances


def natural(text) -> list:
    """Sort key under which train_2 comes before train_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", str(text))]


def listing(folder: Path) -> str:
    """What is in a folder, for an error message."""
    names = sorted((p.name for p in folder.iterdir() if p.name[0] != "."), key=natural)
    return (", ".join(names[:6]) or "nothing") + f" and {len(names) - 6} more" * (len(names) > 6)


def find_root(name: str, official: str | None, root) -> Path:
    """A dataset's folder: `root`, else $PGSEG_DATA/<official name>, in upper or lower case."""
    place = os.environ.get("PGSEG_DATA") if root is None and official else root
    if not place:
        also = f", or set PGSEG_DATA to the folder that holds {official}" if official else ""
        raise DataError(f"{name}: no data given; pass root=, the folder of its files{also}")
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; correct root (or PGSEG_DATA) for {name}")
    return subfolder(folder, official) if root is None else folder


def subfolder(root: Path, path: str) -> Path:
    """root/path, where each name may be in upper or lower case."""
    here = root
    for name in path.split("/"):
        same = [p for p in sorted(here.iterdir()) if p.is_dir() and p.name.casefold() == name.casefold()]
        if not same:
            raise DataError(f"{root}: looked for {path}, but {here.name} holds {listing(here)}; correct root")
        here = same[0]
    return here


def by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """{stem: path} in natural order, hidden files left out."""
    found = {}
    for path in sorted(folder.iterdir(), key=natural):
        if path.is_file() and path.suffix.lower() in suffixes and path.name[0] != ".":
            if path.stem in found:
                raise DataError(f"{path}: {found[path.stem].name} has the same name; rename one of them")
            found[path.stem] = path
    return found


def pair_up(images: Path, labels: Path, suffixes: tuple[str, ...]) -> dict[str, tuple[Path, Path]]:
    """{id: (image path, label path)}; every image must have its label."""
    pictures, found = by_stem(images, IMAGES), by_stem(labels, suffixes)
    if not pictures:
        raise DataError(f"{images}: looked for png, tif, jpg or bmp and found {listing(images)}; add images")
    for stem, path in pictures.items():
        if stem not in found:
            raise DataError(f"{labels}: no {stem}{suffixes[0]} for the image {path.name}; add it or drop the image")
    return {stem: (path, found[stem]) for stem, path in pictures.items()}


@contextmanager
def opened(path: Path):
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise DataError(f"{path}: holds {image.n_frames} pages; save the one that is meant as a file")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: no readable image ({error}); fetch or export it again") from error


def read_image(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]. Grey and palette images become RGB and an opaque alpha channel is dropped; more than 8 bits
    (which range is black to white?) and transparency (over which background?) are refused."""
    with opened(path) as image:
        # PIL turns 16-bit colour into 8 without a word: only its raw mode, or TIFF's BitsPerSample, shows it
        bits = max(getattr(image, "tag_v2", {}).get(258, (8,)))
        if image.mode[0] in "IF" or ";16" in str(image.tile) or bits > 8:
            raise DataError(f"{path}: more than 8 bits a channel; save it as 8-bit RGB, scaled as it should look")
        rgba = np.asarray(image.convert("RGBA"))  # [H, W, 4]
    clear = np.mean(rgba[..., 3] < 255)
    if clear:
        raise DataError(f"{path}: {clear:.1%} of its pixels are transparent; save it without alpha")
    return np.ascontiguousarray(rgba[..., :3])


def read_labels(path: Path, image: Path, shape: tuple[int, int], key="inst_map") -> np.ndarray:
    """int32 [H, W] of a label map, 0 is background: `key` of a MATLAB file, or an image file (of a palette its
    indices)."""
    if path.suffix == ".mat":
        return as_labels(read_mat(path, key), f"{path}: {key}", image, shape)
    with opened(path) as file:
        layers = np.atleast_3d(file)[..., :3]  # [H, W, 1 or 3]
    if (layers != layers[..., :1]).any():
        raise DataError(f"{path}: a mask in colour; save it as grey, one number a pixel")
    return as_labels(layers[..., 0], f"{path}: mask", image, shape)


def read_mat(path: Path, key: str) -> np.ndarray:
    from scipy.io import loadmat, whosmat

    try:
        content = loadmat(path, variable_names=[key])
    except Exception as error:  # scipy raises another class for each kind of damage
        raise DataError(f"{path}: no readable MATLAB file ({error}); fetch it again, or save it with -v7") from error
    if key not in content:
        held = ", ".join(name for name, *_ in whosmat(path))
        raise DataError(f"{path}: no {key!r} in it, it holds {held}; fetch the official labels again")
    return content[key]


def as_labels(array: np.ndarray, what: str, image: Path, shape: tuple[int, int]) -> np.ndarray:
    """The array as int32 [H, W], once it is certain that nothing is lost and that it fits its image."""
    if array.dtype.kind not in "biuf" or array.ndim != 2:
        raise DataError(f"{what} is {array.dtype} of shape {array.shape}; it must be whole numbers [H, W]")
    if array.shape != tuple(shape):
        here, there = (f"{size[1]} x {size[0]}" for size in (array.shape, shape))  # as viewers say: W x H
        raise DataError(f"{what} is {here} but the image {image.name} is {there}; make both the same size")
    labels = array.astype(np.int32)
    if (labels != array).any() or (labels < 0).any():
        raise DataError(f"{what} holds fractions or negative numbers; labels are whole numbers from 0")
    return labels
