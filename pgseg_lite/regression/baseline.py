"""What a measurement leaves behind, so that the next one can be compared with it item by item: one JSON file."""

import json
import platform
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from .. import __version__
from ..errors import ResultError
from ..files import write_text
from .checks import FAIL
from .collapse import alarms

SCHEMA = 2
KIND = "pgseg robustness baseline"
PER_ITEM = ("dice", "agreement", "level_agreement", "majority", "area_pred")
PER_TARGET = ("area_true", "marked")
ITEM = ["target", "level", "split", "phrasing"]


@dataclass
class Baseline:
    path: Path
    about: dict
    keys: dict  # image id -> digest of its pixels
    records: pd.DataFrame
    alarms: dict  # (gate, target, level) of those that rang when it was stored -> the phrasings that they were about


def versions():
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "pandas")}
    return {"pgseg_lite": __version__, "python": platform.python_version(), **packages}


def save_baseline(result, path):
    """Matrices of images x phrasings, five decimals: 200 images x 150 phrasings make about 1 MB."""
    images, records = list(result.keys), result.records
    items = records[ITEM].drop_duplicates()
    wide = records.set_index(["image", *ITEM])
    columns = pd.MultiIndex.from_frame(items)
    targets = records.drop_duplicates(["image", "target"]).set_index(["image", "target"])
    content = {
        "kind": KIND,
        "schema": SCHEMA,
        "versions": versions(),
        "about": result.about,
        "alarms": [[c.gate, c.target, c.level, c.phrasings] for c in alarms(result) if c.outcome == FAIL],
        "images": result.keys,
        "items": items.to_numpy().tolist(),
        "per_item": {name: plain(wide[name].unstack(ITEM).reindex(index=images, columns=columns)) for name in PER_ITEM},
        "per_target": {
            name: plain(targets[name].astype(float).unstack().reindex(index=images, columns=result.about["targets"]))
            for name in PER_TARGET
        },
    }
    write(path, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")


def plain(frame):
    """Rows of numbers for JSON: null where there is none."""
    return [[None if np.isnan(v) else round(float(v), 5) for v in row] for row in frame.to_numpy(float)]


def write(path, content):
    try:
        write_text(path, content)
    except OSError as error:
        raise ResultError(
            f"{path}: cannot be written ({error.strerror}); give a file in a folder that exists"
        ) from error


def load_baseline(path):
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: no baseline here ({error.strerror}); store one with --save") from error
    except ValueError as error:
        raise ResultError(f"{path}: not valid JSON ({error}); store the baseline again with --save") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ResultError(f"{path}: not a baseline of pgseg robustness; give the file that --save wrote")
    if content.get("schema") != SCHEMA:
        other = f"it has schema {content.get('schema')!r} and this version reads {SCHEMA}"
        raise ResultError(f"{path}: {other}; store it again with --save, or use the version that wrote it")
    try:
        images, items = list(content["images"]), pd.DataFrame(content["items"], columns=ITEM)
        table = {name: np.array(content["per_item"][name], float).reshape(len(images), len(items)) for name in PER_ITEM}
        targets = content["about"]["targets"]
        which = items["target"].map(targets.index).to_numpy()
        for name in PER_TARGET:
            table[name] = np.array(content["per_target"][name], float).reshape(len(images), -1)[:, which]
        records = items.iloc[np.tile(np.arange(len(items)), len(images))].reset_index(drop=True)
        records.insert(0, "image", np.repeat(images, len(items)))
        records = records.assign(**{name: values.ravel() for name, values in table.items()})
        rang = defaultdict(set)
        for *alarm, phrasings in content["alarms"]:  # two may differ only in what the phrasings are taken for
            rang[tuple(alarm)] |= set(phrasings)
        records = records.dropna(subset="majority")  # failed then
        records = records.assign(absent=records["area_true"] == 0, marked=records["marked"] == 1)
        known = dict.fromkeys(("truth", "bank", "bank_digest", "data_digest", "model", "fingerprint"))
        about = known | content["about"]
        return Baseline(path, about, content["images"], records, rang)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ResultError(f"{path}: a damaged baseline ({type(error).__name__}: {error}); store it again") from error
