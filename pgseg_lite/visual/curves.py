"""From the stored table of bent prompts to curves over severity, with intervals over seeds and volumes."""

import numpy as np
import pandas as pd

from ..errors import SettingsError
from ..metrics import interval, two_level_means
from .study import MEASURES


def tidy(table):
    """The stored table with a row per organ: columns organ, dice, distance and copied."""
    keys = [column for column in table if column.split()[0] not in MEASURES]
    parts = []
    for organ in [column.removeprefix("dice ") for column in table if column.startswith("dice ")]:
        named = {f"{name} {organ}": name for name in MEASURES}
        parts.append(table[[*keys, *named]].rename(columns=named).assign(organ=organ))
    return pd.concat(parts, ignore_index=True)


def curves(rows, measure="dice", by=("cell", "prompt", "kind", "severity"), resamples=2000, seed=0):
    """The mean over seeds, volumes and organs with its 95 % interval; seeds and volumes are drawn with replacement."""
    found = []
    for key, part in rows.groupby(list(by), sort=False):
        values = cube(part, measure)
        low, high = interval(two_level_means(values, resamples, seed))
        found.append(dict(zip(by, key, strict=True)) | dict(value=values.mean(), low=low, high=high))
    return pd.DataFrame(found)


def differences(rows, ours, theirs, measure="dice", by=("prompt", "kind", "severity"), resamples=2000, seed=0):
    """One way of training minus the other, paired: same volumes, same seeds, same bent prompts.

    The verdict is "higher" or "lower" only where the interval leaves out zero and every seed by itself agrees.
    """
    if missing := {ours, theirs} - set(rows["cell"]):
        raise SettingsError(f"there is no way of training {missing.pop()!r} here; give rows that have both")
    found = []
    for key, part in rows.groupby(list(by), sort=False):
        values = cube(part[part["cell"] == ours], measure) - cube(part[part["cell"] == theirs], measure)
        low, high = interval(two_level_means(values, resamples, seed))
        signs = set(np.sign(values.mean(axis=1)))
        sure = len(signs) == 1 and not low <= 0 <= high
        verdict = ("higher" if values.mean() > 0 else "lower") if sure else "undecided"
        found.append(dict(zip(by, key, strict=True)) | dict(value=values.mean(), low=low, high=high, verdict=verdict))
    return pd.DataFrame(found)


def cube(part, measure):
    """Means over organs, [seeds, volumes]."""
    return part.groupby(["seed", "volume"])[measure].mean().unstack().to_numpy()
