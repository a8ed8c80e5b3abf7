"""How masks hold while the wording gets worse: Dice and agreement against severity, and their picture."""

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ..errors import SettingsError
from ..evaluation import choose, predict_packed, resample
from ..metrics import areas, dice, interval, iou, pack
from ..prompts import LEVELS
from .perturb import KINDS, SEVERITIES, check_kinds, claimed, perturb

MEASURES = {"agreement": "IoU with the mask of the unperturbed phrasing", "dice": "Dice with the truth"}
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#555555")  # told apart without colour vision
STAYS, MOVES = ("#ffffff", "#111111", "should stay"), ("#fdf0e2", "#a34700", "must move")  # ground, ink, what to expect
UNCLAIMED = ("#f2f2f2", "#555555", "not claimed")


def severity_records(
    model, data, bank, kinds=None, severities=SEVERITIES, levels=LEVELS, split="heldout", per_level=1, seed=0,
    quiet=False,
):  # fmt: skip
    """A row per image, target, phrasing, kind and severity (0 is the phrasing itself); each image is encoded once.

    agreement   IoU with the unperturbed phrasing's own mask, so it needs no truth; NaN where that mask is empty,
                since what is not there cannot be seen to move
    dice        with the target's true mask; NaN where the target is absent or the dataset has no mask of it
    dice_asked  with the true mask of what a foil asks for
    `kinds` are by default those in the languages that the model claims (`model.languages`, otherwise English); others
    are marked in the column `claimed`.
    `per_level` phrasings a target and level (None for all), of the levels that the bank has.
    """
    offered = claimed(getattr(model, "languages", ("en",)))
    kinds = check_kinds(offered if kinds is None else kinds, severities)
    targets = [target for target in bank.targets if target in (data.targets or bank.targets)]
    asked = {target: [level for level in levels if bank.select(target, level, split)] for target in targets}
    phrasings = [p for target in targets for p in choose(bank, target, asked[target], split, per_level)]
    if not phrasings:
        wanted = f"{split or 'train or heldout'} phrasing of {', '.join(targets) or 'a target of the dataset'}"
        raise SettingsError(f"bank {bank.name!r} has no {wanted}; choose another split, or another bank")
    table = perturb(bank, kinds, (0, *(s for s in severities if s)), seed, phrasings)
    table["claimed"] = table["kind"].isin(offered)
    texts = list(dict.fromkeys([*table["source"], *table["text"]]))
    row = {text: i for i, text in enumerate(texts)}
    source, perturbed = table["source"].map(row).to_numpy(), table["text"].map(row).to_numpy()  # [M] each
    if isinstance(model, torch.nn.Module):
        model.eval()
    features = model.encode_text(texts) if hasattr(model, "encode_text") else None
    found = []
    for sample in tqdm(data, desc="perturbing", unit="image", disable=quiet):
        packed, presence = predict_packed(model, sample, texts, features)  # [P, N], [P]
        area = areas(packed)  # [P]
        agreement = np.where(area[source] > 0, iou(packed[perturbed], packed[source]), np.nan)  # [M]
        fit = {column: fit_with_truth(sample, table[of], packed[perturbed])
               for column, of in (("dice", "target"), ("dice_asked", "asks_for"))}  # fmt: skip
        share = area[perturbed] / np.prod(sample.image.shape[:2])
        found.append(table.assign(image=sample.id, agreement=agreement, **fit, area_pred=share,
                                  presence=presence[perturbed]))  # fmt: skip
    if not found:
        raise SettingsError(f"dataset {data.name!r} has no samples to perturb")
    return pd.concat(found, ignore_index=True).assign(segmenter=model.name, dataset=data.name)


def fit_with_truth(sample, targets, packed):
    """Dice of each mask [M, N] with the true mask of its target; NaN where there is none."""
    fit = np.full(len(targets), np.nan)
    for target, truth in sample.masks.items():
        rows = (targets == target).to_numpy()
        if truth.any() and rows.any():
            fit[rows] = dice(packed[rows], pack(truth))
    return fit


def severity_curves(records, by=("segmenter", "kind"), resamples=1000, seed=0):
    """The mean over images of each measure by kind and severity, with a 95 % bootstrap interval over source images."""
    rows = []
    for key, part in records.groupby([*by, "severity"], sort=False):
        row = dict(zip([*by, "severity"], key, strict=True))
        row |= {name: bool(part[name].iloc[0]) for name in ("must_move", "claimed")}
        per_image = part.groupby("image", sort=False)[["dice", "agreement", "dice_asked"]].mean()
        estimate, samples = resample(per_image, resamples, seed)
        for name, value, low, high in zip(per_image, estimate, *interval(samples), strict=True):
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row | {"phrasings": part["source"].nunique(), "images": len(per_image)})
    return pd.DataFrame(rows)


def show_severity(curves, measure="agreement", columns=4):
    """A panel a kind, a line a segmenter with its interval; tinted are the kinds that must move the mask."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    if measure not in MEASURES:
        raise SettingsError(f"measure {measure!r} is unknown; choose from {', '.join(MEASURES)}")
    kinds = [kind for kind in KINDS if kind in set(curves["kind"])]
    segmenters = list(curves["segmenter"].unique())
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(segmenters)}
    rows = -(-len(kinds) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.7 * columns, 2.1 * rows + 0.4), sharex=True, sharey=True, squeeze=False,
        layout="constrained", facecolor="white",
    )  # fmt: skip
    for axis, kind in zip(axes.flat, kinds, strict=False):
        part = curves[curves["kind"] == kind].sort_values("severity")
        must_move, offered = part[["must_move", "claimed"]].iloc[0]
        ground, ink, expected = MOVES if must_move else STAYS if offered else UNCLAIMED
        sns.lineplot(
            part, x="severity", y=measure, hue="segmenter", palette=colours, marker="o", errorbar=None, legend=False,
            ax=axis,
        )  # fmt: skip
        ends = []
        for name, line in part.dropna(subset=measure).groupby("segmenter", sort=False):
            axis.fill_between(
                line["severity"], line[f"{measure}_low"], line[f"{measure}_high"], color=colours[name], alpha=0.2, lw=0
            )
            ends.append((line[measure].iloc[-1], name))
        heights = spread([height for height, _ in sorted(ends)])
        for height, (_, name) in zip(heights, sorted(ends), strict=True):
            axis.text(max(SEVERITIES) + 0.2, height, name, color=colours[name], fontsize=8, va="center")
        axis.set_facecolor(ground)
        axis.set_title(f"{kind}: {expected}", fontsize=9, color=ink)
        axis.set(xlim=(-0.3, 7.4), ylim=(-0.03, 1.06), xticks=range(6), xlabel="", ylabel="")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[max(len(kinds) - columns, 0) :]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    figure.supxlabel("severity of the change in wording", fontsize=9)
    figure.supylabel(MEASURES[measure], fontsize=9)
    plt.close(figure)
    return figure


def spread(heights, gap=0.11):
    """Ascending heights of labels, moved apart so that none covers another and none leaves the top."""
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], 1.02 - gap * (len(heights) - 1 - i))
    return heights
