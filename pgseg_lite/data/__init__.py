"""Images and masks: `load_dataset(name, ...)` gives the same `Sample`s whatever the source."""

from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from .dataset import Dataset, Sample
from .files import find_root
from .official import open_official
from .own import open_coco, open_folder
from .pannuke import open_pannuke

__all__ = ["READERS", "Dataset", "Sample", "describe_datasets", "load_dataset"]


class Reader(NamedTuple):
    open: Callable  # (name, root, split, **options) -> source
    folder: str | None  # official name of its folder; None where there is none
    splits: tuple[str, ...] | None  # None where the files say
    about: str
    options: dict = {}  # noqa: RUF012  name -> default


def _open_synthetic(name, root, split, size, shift):
    from .synthetic import SyntheticSource  # the one reader that is not light to import

    return SyntheticSource(split, size, shift)


_ALL, _TWO, _THREE = ("all",), ("train", "test"), ("train", "val", "test")
_FOLDS, _KUMAR = ("fold1", "fold2", "fold3"), ("train", "test_same", "test_diff")
_PAINT = {"size": 64, "shift": None}
READERS = {
    "synthetic": Reader(_open_synthetic, None, _THREE, "painted tissue, five classes, no files", _PAINT),
    "pannuke": Reader(open_pannuke, "PanNuke", _FOLDS, "19 tissues, five classes", {"hub": False}),
    "consep": Reader(open_official, "CoNSeP", _TWO, "colorectal, four classes"),
    "cpm15": Reader(open_official, "cpm15", _ALL, "brain tumours, 20x and 40x"),
    "cpm17": Reader(open_official, "cpm17", _TWO, "four tumours"),
    "kumar": Reader(open_official, "Kumar", _KUMAR, "seven organs"),
    "cryonuseg": Reader(open_official, "CryoNuSeg", _ALL, "ten organs, frozen sections"),
    "histology": Reader(open_official, "histology", _ALL, "the histology set of TransNuSeg"),
    "folder": Reader(open_folder, None, None, "your images/, masks/ and masks/CATEGORY/"),
    "coco": Reader(open_coco, None, _ALL, "your images and one COCO JSON", {"annotations": None}),
}


def describe_datasets() -> str:
    """A line for each dataset: its name, splits, official folder, what it is and its options."""
    lines = [f"{'name':<10} {'splits':<26} folder"]
    for name, (_, folder, splits, about, options) in READERS.items():
        extra = f"; options {', '.join(options)}" if options else ""
        lines.append(f"{name:<10} {' '.join(splits or ['all, or subfolders']):<26} {folder or '-':<10} {about}{extra}")
    return "\n".join(lines)


def load_dataset(name, root=None, split="train", fraction=1.0, seed=0, tile=256, **options) -> Dataset:
    """The named dataset; `READERS` lists the names with their splits and options.

    root: the dataset's own folder, else $PGSEG_DATA/<official name>. tile: side in pixels, None for whole
    images. fraction, seed: which share of the tiles (or whole images), the same everywhere.
    """
    if name not in READERS:
        raise DataError(f"there is no dataset {name!r}; choose one of {', '.join(READERS)}")
    reader = READERS[name]
    for option in set(options) - set(reader.options):
        raise DataError(f"{name} has no option {option!r}; it has: {', '.join(reader.options) or 'none'}")
    if reader.splits and split not in reader.splits:
        raise DataError(f"{name} has no split {split!r}; choose one of {', '.join(reader.splits)}")
    if not isinstance(fraction, Real) or not 0 < fraction <= 1:
        raise DataError(f"fraction is {fraction!r}; give a number above 0 and up to 1")
    if tile is not None and (not isinstance(tile, Integral) or tile < 1):
        raise DataError(f"tile is {tile!r}; give a whole number of at least 1")
    if name == "synthetic" and root is not None:
        raise DataError(f"synthetic paints its images and reads nothing from {root}; leave root away")
    if name != "synthetic" and not (options.get("hub") and root is None):
        root = find_root(name, reader.folder, root)
    source = reader.open(name, root, split, **{**reader.options, **options})
    changed = {option: value for option, value in options.items() if value != reader.options[option]}
    if "annotations" in changed:  # the name, not the path: a digest must not hang on where files lie
        changed["annotations"] = Path(changed["annotations"]).name
    return Dataset(source, split, tile and int(tile), float(fraction), int(seed), changed)
