"""The stored study, read: paired differences between cells, with intervals over images and seeds."""

import pandas as pd

from ..errors import ResultError
from ..tables import cube, paired, tasks

MEASURE = "dice_50"


def scores(table, measure=MEASURE):
    """Percent by cell and seed, columns T1 (all nuclei) and T2 (the mean over the categories)."""
    rows = {}
    for key, part in table.assign(tiles=1).groupby(["cell", "seed"], sort=False):
        sums, counts = cube(part, measure)
        rows[key] = {name: 100 * value for name, value in tasks(sums.sum((0, 1)), counts.sum((0, 1))).items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["cell", "seed"])


def compared(table, pairs, measure=MEASURE, resamples=2000, seed=0):
    """Each (cell, reference) as in `tables.compare`: value, its interval, the difference, its interval, a verdict."""
    rows, table = [], table.assign(tiles=1)
    for pair in pairs:
        if missing := [cell for cell in pair if cell not in set(table["cell"])]:
            raise ResultError(
                f"there is no cell {missing[0]!r} here; choose one of {', '.join(table['cell'].unique())}"
            )
        sides = [table[table["cell"] == cell] for cell in pair]
        for row in paired(*sides, measure, 1, resamples, seed):
            rows.append(dict(cell=pair[0], reference=pair[1], measure=measure) | row)
    found = pd.DataFrame(rows)
    shares = ["value", "low", "high", "difference", "difference_low", "difference_high"]
    return found.assign(**{name: 100 * found[name] for name in shares})
