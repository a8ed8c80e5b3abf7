"""What a model said about an item, an image and a phrasing: checked, and kept so that nothing is asked twice."""

import hashlib
import sqlite3
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError, ModelError, PgsegError, ResultError
from .worker import no_mask, said


class Answer(NamedTuple):
    packed: np.ndarray | None  # uint64 [N], None where the item failed
    presence: float = np.nan  # probability; NaN where the model does not say
    reason: str = ""  # why it failed


def as_mask(answer, shape):
    """bool [H, W] from what a model returned, or a sentence on what is wrong with it."""
    mask = np.asarray(answer)
    if problem := no_mask(mask):
        raise ModelError(problem)
    if mask.shape != tuple(shape):
        here, there = (f"{size[1]} x {size[0]}" for size in (mask.shape, shape))  # as viewers say: W x H
        raise ModelError(f"returned a mask of {here} pixels for an image of {there}; return it at the image's size")
    if mask.dtype.kind == "f":
        if not np.isfinite(mask).all():
            raise ModelError("returned NaN or infinity; the model or its weights are broken")
        if mask.min() < 0 or mask.max() > 1:
            raise ModelError(f"returned {mask.min():.3g} to {mask.max():.3g}; return probabilities (0 to 1), or bool")
        return mask > 0.5
    if mask.dtype != bool and len(values := np.unique(mask[mask != 0])) > 1:
        raise ModelError(f"returned {len(values)} grey levels besides 0; return one level for the mask and 0 elsewhere")
    return mask != 0


def read_mask(file):
    """The values of a mask image [H, W], from a path or an open file."""
    from ..data.files import opened

    try:
        with opened(file) as image:
            return np.asarray(image)
    except DataError as error:
        raise ModelError("the mask is no readable image of one page; write it as PNG") from error


def reason_of(error):
    return str(error) if isinstance(error, PgsegError) else said(error)


def fingerprint(*parts):
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def version_of(path):
    """What of a file decides an answer: its bytes. Empty where there is no such file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""


def image_key(image):
    return hashlib.blake2b(f"{image.shape}".encode() + image.tobytes(), digest_size=12).hexdigest()


class Answers:
    """A folder with the answers of any number of models; without a folder they are kept in memory.

    One SQLite file: an answer that was committed survives a kill, and there are too many for a file each.
    """

    def __init__(self, folder=None):
        self.path, self.fresh, self.written = ":memory:", [], time.monotonic()
        self.effort = 0 if folder is None else 1  # of compression
        if folder is not None:
            self.path = Path(folder) / "answers.sqlite"
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ResultError(f"{folder}: no folder for the answers ({error}); give one to write to") from error
        with self.reading():
            self.file = sqlite3.connect(self.path)
            self.file.execute(
                "CREATE TABLE IF NOT EXISTS answers (model TEXT, image TEXT, phrasing TEXT, presence REAL, mask BLOB,"
                " PRIMARY KEY (model, image, phrasing))"
            )
            self.of("", "")

    @contextmanager
    def reading(self):
        try:
            yield
        except (sqlite3.Error, zlib.error) as error:
            raise ResultError(
                f"{self.path}: cannot be used to keep answers ({error}); delete it, or move it"
            ) from error

    def of(self, model, image):
        """{phrasing: Answer} of what is known."""
        asked = "SELECT phrasing, presence, mask FROM answers WHERE model = ? AND image = ?"
        with self.reading():
            return {
                phrasing: Answer(np.frombuffer(zlib.decompress(mask), np.uint64), np.nan if said is None else said)
                for phrasing, said, mask in self.file.execute(asked, (model, image))
            }

    def keep(self, model, image, phrasing, answer):
        """Written at most once a second, all at once: a kill loses one second of answers."""
        mask = zlib.compress(answer.packed.tobytes(), self.effort)
        self.fresh.append((model, image, phrasing, answer.presence, mask))  # NaN is stored as NULL
        if time.monotonic() - self.written > 1:
            self.write()

    def write(self):
        with self.reading(), self.file:
            self.file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", self.fresh)
        self.fresh, self.written = [], time.monotonic()

    def close(self):
        self.write()
        self.file.close()
