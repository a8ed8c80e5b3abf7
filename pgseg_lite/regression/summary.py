"""Figures of a measurement: by target and level, each with a bootstrap interval over images."""

import numpy as np
import pandas as pd
from scipy import special

from ..data.dataset import source_of
from ..evaluation import resample, robustness, with_interval

ALL_LEVELS = "any"  # a target's phrasings of all levels as one group
SHOWN = ("mean", "sd", "range", "worst", "agreement", "flips", "false_area")  # columns of `dispersion`
HEADINGS = dict(zip(SHOWN, ("Dice", "spread", "range", "worst", "agreement", "flips", "false area"), strict=True))


def asked_for(result):
    """The records without the foils."""
    return result.records[result.records["split"] != "foils"]


def dispersion(result, resamples=1000, seed=0):
    """`robustness` by target and level. Without true masks Dice is that with the majority mask of the target."""
    records = asked_for(result)
    records = records.assign(dice=records[result.fit])
    within = records.assign(agreement=records["level_agreement"], flips=records["level_flips"])
    both = pd.concat([records.assign(level=ALL_LEVELS), within])
    table = robustness(both, by=("target", "level"), resamples=resamples, seed=seed)
    order = {target: i for i, target in enumerate(result.about["targets"])}
    return table.sort_values("target", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)


def by_image(records, fit):
    """A row per image, a column per (measure, target, level): means over the phrasings asked.

    fit, spread (sd over phrasings) where the target is present; false_area where it is absent; agreement everywhere;
    separation (level foil): how much nearer phrasings are to the target's majority mask than its foils are.
    """
    foils = records[records["split"] == "foils"]
    records = records[records["split"] != "foils"]
    within = records.assign(agreement=records["level_agreement"])
    both = pd.concat([records.assign(level=ALL_LEVELS), within])
    present = both[~both["absent"]].groupby(["image", "target", "level"], sort=False)[fit]
    measures = {
        "fit": present.mean(),
        "spread": present.std(ddof=0),
        "agreement": both.groupby(["image", "target", "level"], sort=False)["agreement"].mean(),
        "false_area": both[both["absent"]].groupby(["image", "target", "level"], sort=False)["area_pred"].mean(),
    }
    near = [part[part["marked"]].groupby(["image", "target"])["majority"].mean() for part in (records, foils)]
    apart = (near[0] - near[1]).dropna().to_frame("value").assign(level="foil").set_index("level", append=True)["value"]
    measures["separation"] = apart
    wide = pd.concat({name: values for name, values in measures.items() if len(values)}, names=["measure"])
    return wide.unstack("image").T.reindex(records["image"].unique())


def level_gap(result, resamples=1000, seed=0):
    """A row per target: fit at its last level minus that at its first, on the same images."""
    wide, rows = by_image(result.records, result.fit), []
    for target in result.about["targets"]:
        levels = [level for level in result.about["levels"] if ("fit", target, level) in wide]
        if len(levels) > 1:
            difference = wide["fit", target, levels[-1]] - wide["fit", target, levels[0]]
            rows.append(dict(target=target, levels=f"{levels[-1]} minus {levels[0]}") | figure("gap", difference))
    return pd.DataFrame(rows, columns=["target", "levels", "gap", "gap_low", "gap_high"])


def separation(result):
    """A row per target that has foils."""
    wide = by_image(result.records, result.fit)
    found = [column for column in wide if column[0] == "separation"]
    rows = [dict(target=column[1]) | figure("separation", wide[column]) for column in found]
    return pd.DataFrame(rows, columns=["target", "separation", "separation_low", "separation_high"])


def figure(name, values, resamples=1000, seed=0):
    """The mean over images of a Series, with its interval."""
    return with_interval(name, *resample(values.to_frame(), resamples, seed))


def sources(wide):
    """Source images with a value, for each column: tiles `source@y,x` of one image count once."""
    return wide.notna().groupby(wide.index.map(source_of)).any().sum().to_numpy()


def simultaneous(wide, resamples=2000, seed=0, level=0.95):
    """Estimate, low, high of each column's mean over images, so that all intervals hold at once with this probability.

    One width in standard errors for all columns: the quantile of the largest deviation among them (max-t bootstrap).
    Columns that move together cost little; with few images Student's t widens them.
    """
    estimate, samples = resample(wide, resamples, seed)  # [M], [n, M]
    count = np.maximum(sources(wide), 2)
    error = np.nanstd(samples, axis=0) * np.sqrt(count / (count - 1))
    moved = error > 1e-12
    width = 0.0
    if moved.any():
        width = np.quantile(np.nanmax(np.abs(samples - estimate)[:, moved] / error[moved], axis=1), level)
    students, normal = special.stdtrit(count - 1, (1 + level) / 2), special.ndtri((1 + level) / 2)
    reach = width * error * students / normal
    return estimate, estimate - reach, estimate + reach


def interval(estimate, low, high):
    return f"{estimate:.3f} ({low:.3f} to {high:.3f})"
