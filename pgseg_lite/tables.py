"""From records to the tables of the book: means by source image, and paired comparisons with intervals.

T1 is the Dice of all nuclei, T2 the mean over the categories. The unit of resampling is the source image: its tiles
look alike. A category that an image lacks does not count there.
"""

import numpy as np
import pandas as pd

from .data.dataset import source_of
from .errors import ResultError
from .metrics import bootstrap_weights, interval
from .results import find_result, load_result

# Is more of it better? All but false_area are means over the tiles that have the target.
MEASURES = {"dice": True, "lowest": True, "sd": False, "agreement": True, "flips": False, "false_area": False}
TASKS = ("T1", "T2")


def by_image(records, by_level=False):
    """A row per source image, target and split of the phrasings; `by_level` adds a row for each level of quality.

    dice, sd, lowest: mean, spread and minimum over the phrasings of a tile; agreement and flips of all levels together;
    tiles: how many have the target, the mean is over these; false_area: the mean over the `absent` other tiles.
    """
    parts = [records.assign(level="any")] + [records] * by_level
    tables = []
    for part in parts:
        tile = ["dataset", "split", "level", "target", "image"]
        groups = part.assign(false_area=part["area_pred"].where(part["absent"])).groupby(tile, sort=False)
        found = groups.agg(
            dice=("dice", "mean"), sd=("dice", lambda fit: fit.std(ddof=0)), lowest=("dice", "min"),
            agreement=("agreement", "mean"), flips=("flips", "mean"), absent=("absent", "first"),
            false_area=("false_area", "mean"),
        ).reset_index()  # fmt: skip
        present = ["dice", "sd", "lowest", "agreement", "flips"]
        found[present] = found[present].where(~found["absent"])
        found["image"] = found["image"].map(source_of)
        groups = found.assign(tiles=~found["absent"]).groupby(tile, sort=False)
        tables.append(
            groups.agg({name: "mean" for name in (*present, "false_area")} | {"tiles": "sum", "absent": "sum"})
        )
    return pd.concat(tables).reset_index().round(5)


def by_phrasing(records):
    """A row per target and phrasing: its mean Dice where the target is present, its false area where it is not."""
    key = ["dataset", "split", "level", "target", "phrasing"]
    present = records["dice"].where(~records["absent"]), records["area_pred"].where(records["absent"])
    found = records.assign(dice=present[0], false_area=present[1]).groupby(key, sort=False)
    return found[["dice", "false_area"]].mean().reset_index().round(5)


def scores(table):
    """T1 and T2 of every measure, a row per method, seed, test, level and split; seeds apart, no intervals."""
    key = ["test", "level", "split", "method", "seed"]
    rows = []
    for keys, part in table.groupby(key, sort=False):
        for measure in MEASURES:
            sums, counts = cube(part, measure)
            rows.append(
                dict(zip(key, keys, strict=True)) | {"measure": measure} | tasks(sums.sum((0, 1)), counts.sum((0, 1)))
            )
    return pd.DataFrame(rows).melt([*key, "measure"], TASKS, "task", "value").dropna(subset="value", ignore_index=True)


def compare(table, reference, resamples=2000, seed=0):
    """Each method beside `reference`, paired: same images, same seeds, same phrasings.

    value, low, high             the method's own mean and its 95 % interval
    difference, .._low, .._high  method minus reference
    effect                       the mean difference over its standard deviation between images
    seeds_agree                  every seed by itself gives the difference this sign
    verdict                      "better" or "worse" only where the interval leaves out zero and the seeds agree
    Seeds and source images are both drawn with replacement. Three seeds are few: their share of the interval is
    a low estimate, which is why the verdict asks every seed too.
    """
    if reference not in set(table["method"]):
        raise ResultError(f"there is no method {reference!r} here; choose one of {', '.join(table['method'].unique())}")
    table, rows = table.copy(deep=False), []
    table.attrs = {}  # pandas would copy the stamp with every selection
    for (test, level, split), part in table.groupby(["test", "level", "split"], sort=False):
        for method in part["method"].unique():
            ours, theirs = (part[part["method"] == name] for name in (method, reference))
            seeds = sorted({*ours["seed"]} & {*theirs["seed"]})
            if not seeds:
                continue
            pair = [side[side["seed"].isin(seeds)] for side in (ours, theirs)]
            for measure in ["dice"] if split == "foils" else MEASURES:
                key = dict(test=test, level=level, split=split, method=method, measure=measure, seeds=len(seeds))
                wanted = 1 if MEASURES[measure] and split != "foils" else -1  # a foil should not get the target's mask
                rows += [key | row for row in paired(*pair, measure, wanted, resamples, seed)]
    return pd.DataFrame(rows)


def paired(ours, theirs, measure, wanted, resamples, seed):
    sides = [cube(side, measure) for side in (ours, theirs)]  # 2 x (sums, counts), [seeds, images, targets] each
    seeds, images = sides[0][0].shape[:2]
    by_seed, by_image = bootstrap_weights(seeds, resamples, seed), bootstrap_weights(images, resamples, seed + 1)

    def drawn(side):
        return tasks(*(np.einsum("nr,nrt->nt", by_seed, np.tensordot(by_image, part, (1, 1))) for part in side))

    def each(side, axes):
        return tasks(*(part.sum(axes) for part in side))

    estimate, samples = [each(side, (0, 1)) for side in sides], [drawn(side) for side in sides]
    per_seed, per_image = ([each(side, axis) for side in sides] for axis in (1, 0))
    for task in TASKS:
        if np.isnan(estimate[0][task]):
            continue
        difference = estimate[0][task] - estimate[1][task]
        (own_low, low), (own_high, high) = interval(
            np.stack([samples[0][task], samples[0][task] - samples[1][task]], axis=1)
        )
        signs = np.sign(per_seed[0][task] - per_seed[1][task])
        between = per_image[0][task] - per_image[1][task]
        between = between[~np.isnan(between)]
        spread = between.std(ddof=1) if len(between) > 1 else 0.0
        agree = len(set(signs)) == 1
        sure = agree and not low <= 0 <= high
        verdict = ("better" if difference * wanted > 0 else "worse") if sure else "undecided"
        yield dict(
            task=task, value=estimate[0][task], low=own_low, high=own_high, difference=difference, difference_low=low,
            difference_high=high, effect=difference / spread if spread else np.nan, seeds_agree=agree, verdict=verdict,
        )  # fmt: skip


def cube(table, measure):
    """Sums and counts of a measure over tiles, both [seeds, images, targets], "all" first."""
    counts = table["absent" if measure == "false_area" else "tiles"].to_numpy(float, copy=True)
    values = table[measure].to_numpy(float)
    counts[np.isnan(values)] = 0  # no tile counts, or nothing is known, such as the agreement of a single phrasing
    sums = np.nan_to_num(values) * counts
    shape, places = [], []
    for name in ("seed", "image", "target"):
        values = table[name].tolist()
        order = {value: i for i, value in enumerate(sorted(set(values), key=lambda value: (value != "all", value)))}
        shape.append(len(order))
        places.append([order[value] for value in values])
    cubes = np.zeros((2, *shape))
    cubes[:, *places] = sums, counts  # plain arrays: reindexing a frame takes ten times as long
    return list(cubes)


def tasks(sums, counts):
    """[..., targets] -> T1 [...] and T2 [...]; NaN where no tile counts."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
    others = means[..., 1:]
    known = ~np.isnan(others)
    t2 = np.where(known.any(-1), np.where(known, others, 0).sum(-1) / np.maximum(known.sum(-1), 1), np.nan)
    return {"T1": means[..., 0][()], "T2": t2[()]}  # floats where there are no leading axes


def worst_phrasings(table):
    """From `by_phrasing`: per method, test, level and target the phrasing with the lowest mean Dice over the seeds."""
    key = ["test", "split", "level", "method", "target"]
    means = table.groupby([*key, "phrasing"], sort=False)["dice"].mean().dropna().reset_index()
    return means.loc[means.groupby(key, sort=False)["dice"].idxmin()].reset_index(drop=True)


def with_full(side, *names, index, columns, root=None, **where):
    """A chapter's table with columns "full: ..." for what the named experiments gave at the full profile (NAME_full).

    They hold mean Dice in percent, pivoted by `index` and `columns` as the table is, with its row names; `where` keeps
    the given values of a column. One sentence for each experiment that was not run, and the table as it is for none.
    """
    found = []
    for name in names:
        try:
            find_result(f"{name}_full.csv", root)
        except ResultError:
            print(f"not measured yet: `pgseg experiment {name} --profile full` on a GPU fills a `full` column here")
            continue
        rows = scores(load_result(f"{name}_full", root)).query("measure == 'dice'")
        for column, wanted in where.items():
            rows = rows[rows[column].isin(np.atleast_1d(wanted))]
        found.append(100 * rows.pivot_table(index=index, columns=columns, values="value", sort=False))
    if not found:
        return side
    full = pd.concat(found).round(1)
    full.columns = [f"full: {' '.join(np.atleast_1d(column))}" for column in full.columns]
    rows = [*side.index, *(row for row in full.index if row not in side.index)]
    return side.reindex(rows).join(full.reindex(rows))
