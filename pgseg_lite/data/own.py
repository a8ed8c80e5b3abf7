"""Your own data: `folder` (images beside masks that are images) and `coco` (images and one JSON).

folder: `images/*`, and masks of the same name in `masks/*.png` (all nuclei), `masks/CATEGORY/*.png`, or both; "all" is
  the union. A mask is binary or a label map; zero is background, and an image without nuclei of a category still needs
  its empty mask. That is the split "all"; others are `SPLIT/images` with `SPLIT/masks`.
coco: the only *.json in root, or `annotations=` (a path, or a name in root); one split, "all". `categories` become the
  targets, "all" is the union. Images are sought at root/file_name, then root/images/file_name. A `segmentation` is
  polygons (a pixel belongs when its centre does) or a run-length code, plain or compressed. Crowd regions count too.
"""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from ..errors import DataError
from .files import MASKS, FileSource, by_stem, layer, listing, natural, pair_up, read_labels


def open_folder(name: str, root: Path, split: str) -> FileSource:
    here = root if split == "all" else root / split
    if not (here / "images").is_dir() or not (here / "masks").is_dir():
        splits = ["all"] * (root / "images").is_dir() + sorted(p.parent.name for p in root.glob("*/images"))
        held, known = listing(here) if here.is_dir() else "no such folder", ", ".join(splits) or "none"
        raise DataError(f"{here}: looked for images and masks, found {held}; splits in root: {known}")
    layers = {"all": here / "masks"} if by_stem(here / "masks", MASKS) else {}
    layers |= {p.name: p for p in sorted(here.glob("masks/[!.]*"), key=natural) if p.is_dir()}
    if not layers:
        raise DataError(f"{here / 'masks'}: looked for masks ({', '.join(MASKS)}) and found none; add them")
    found = {target: pair_up(here / "images", folder, MASKS) for target, folder in layers.items()}
    images = next(iter(found.values()))  # the same in each
    files = {id: (images[id][0], {target: found[target][id][1] for target in found}) for id in images}
    return FileSource(name, tuple(dict.fromkeys(["all", *layers])), files, decode_folder)


def decode_folder(paths: dict[str, Path], image: Path, shape):
    labels = {target: read_labels(path, image, shape) for target, path in paths.items()}  # [H, W] each
    masks = {target: label > 0 for target, label in labels.items()}
    masks["all"] = np.logical_or.reduce(list(masks.values()))
    nuclei = labels.get("all")  # with a single value it may be a binary mask: nuclei are then not told apart
    return masks, nuclei if nuclei is not None and np.unique(nuclei[nuclei > 0]).size > 1 else None


def open_coco(name: str, root: Path, split: str, annotations) -> FileSource:
    jsons = [root / annotations] if annotations else list(root.glob("*.json"))
    if len(jsons) != 1:
        raise DataError(f"{root}: looked for one *.json and found {listing(root)}; pass annotations=")
    path, drawn, files = jsons[0], defaultdict(list), {}  # drawn: image id -> [(where, target, segmentation)]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {i["id"]: (str(i["file_name"]), (i["height"], i["width"])) for i in content["images"]}
        if len(images) < len(content["images"]):
            raise DataError(f"{path}: two images have the same id, as where exports were joined; number them anew")
        names = {c["id"]: str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
        for a in content["annotations"]:
            where = f"{path}: annotation {a['id']}"
            if a["image_id"] not in images or a["category_id"] not in names:
                raise DataError(f"{where} has an image_id or category_id that is not listed; export it again")
            drawn[a["image_id"]].append((where, names[a["category_id"]], a["segmentation"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: no usable COCO ({why}); export it with segmentations") from error
    targets = ("all", *names.values())
    if not images or len(set(targets)) < len(targets):
        raise DataError(f"{path}: no image, a category twice, or one called 'all'; correct it")
    for number, (file, size) in sorted(images.items(), key=lambda item: natural(item[1][0])):
        here = next((place for place in (root / file, root / "images" / file) if place.is_file()), None)
        if here is None:
            raise DataError(f"{path}: the image {file} is neither in root nor in its folder images; correct the names")
        name_here = str(PurePosixPath(file).with_suffix(""))
        if name_here in files:
            raise DataError(f"{path}: two images are called {name_here}; give each its own file name and one entry")
        files[name_here] = (here, (size, drawn[number]))
    return FileSource(name, targets, files, partial(decode_coco, targets))


def decode_coco(targets, labels, image: Path, shape):
    said, drawn = labels
    if said != shape:
        here, there = (f"{width} x {height}" for height, width in (shape, said))
        raise DataError(f"{image}: is {here} but its entry in the JSON says {there}; export it again")
    return layer(shape, targets, ((target, decode(code, *shape, where)) for where, target, code in drawn))


def decode(segmentation, height: int, width: int, where: str) -> np.ndarray:
    """bool [H, W] from polygons or a run-length code."""
    try:
        if isinstance(segmentation, dict):
            counts = segmentation["counts"]
            runs = decode_counts(counts) if isinstance(counts, str) else counts
            if segmentation["size"] != [height, width] or sum(runs) != height * width or min(runs) < 0:
                raise ValueError(f"a run-length code that does not fill {width} x {height}")
            # runs go down the columns and alternate, background first
            return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
        mask = np.zeros((height, width), bool)
        if not segmentation or min(len(points) for points in segmentation) < 6:
            raise ValueError("no polygon of at least three points")
        for points in segmentation:
            fill(mask, np.asarray(points, float).reshape(-1, 2))
        return mask
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: segmentation not readable ({error}); draw it again") from error


def fill(mask: np.ndarray, points: np.ndarray) -> None:
    """Set the pixels of mask [H, W] whose centres lie in the polygon [N, 2] of x, y (even-odd rule)."""
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    for row in range(max(0, int(y0.min())), min(len(mask), int(np.ceil(y0.max())))):
        cut = (y0 <= row + 0.5) != (y1 <= row + 0.5)  # edges that cross the line through the pixel centres
        xs = np.sort(x0[cut] + (row + 0.5 - y0[cut]) * (x1 - x0)[cut] / (y1 - y0)[cut])
        for left, right in np.maximum(0, np.ceil(xs - 0.5)).astype(int).reshape(-1, 2):
            mask[row, left:right] = True


def decode_counts(text: str) -> list[int]:
    """Runs of COCO's compressed form: 5 bits a character, low ones first, the sixth says that more follow; from the
    fourth run on a number is the difference to the run two places before."""
    runs, value, shift = [], 0, 0
    for bits in (ord(character) - 48 for character in text):
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs
