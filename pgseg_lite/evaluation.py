"""A bank, a dataset and a model become records: one tidy table, a row per image, target and phrasing."""

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from .data.dataset import source_of
from .errors import BankError, ModelError, SettingsError
from .metrics import areas, bootstrap_means, dice, flip_share, group_agreement, interval, iou, pack
from .models.base import SegmentationOutput
from .prompts import LEVELS, Phrasing

CHUNK = 64  # phrasings decoded at once: bounds memory, changes nothing


def evaluate(model, data, bank, levels=LEVELS, split="heldout", per_level=10, quiet=False):
    """Records of `model` on every image of `data`, for every target the dataset has.

    `per_level` phrasings a target and level, evenly spaced in the bank's order (None for all). `split` is heldout,
    train, or foils: texts that resemble a target's phrasings and ask for something else, so that a high Dice is bad.
    A row holds dice and iou (empty-mask convention: `metrics`), presence (probability), area_true and
    area_pred (shares of the image), absent (the target is not in this image), agreement (mean IoU of this
    mask with the others of its group) and flips (share of the image on which the group does not agree).
    A model that is shown where the nuclei are (`predict_from_masks`) reads no phrasing: one row an image and target.
    """
    check_name(model)
    if shown := getattr(model, "visual_prompt", None):
        phrasings = {target: [Phrasing(shown, target, "visual", "visual", "", shown)] for target in data.targets}
    else:
        phrasings = {target: choose(bank, target, levels, split, per_level) for target in data.targets}
    texts = [p.text for chosen in phrasings.values() for p in chosen]
    if not texts:
        raise BankError(f"bank {bank.name!r} has no {split} for any of {', '.join(data.targets)}; add some first")
    if isinstance(model, torch.nn.Module):
        model.eval()
    text_features = model.encode_text(texts) if hasattr(model, "encode_text") else None
    rows = []
    for sample in tqdm(data, desc="evaluating", unit="image", disable=quiet):
        if shown:
            answered = pack_answers(model, sample, [(model.predict_from_masks(sample, data.targets), len(texts))])
        else:
            answered = predict_packed(model, sample, texts, text_features)
        packed, presence = answered  # [P, N], [P]
        start = 0
        for target, chosen in phrasings.items():
            stop = start + len(chosen)
            rows += group_rows(sample, target, chosen, packed[start:stop], presence[start:stop])
            start = stop
    if not rows:
        raise SettingsError(f"dataset {data.name!r} has no samples to evaluate")
    return pd.DataFrame(rows).assign(segmenter=model.name, dataset=data.name)[list(COLUMNS)]


COLUMNS = (
    "segmenter", "dataset", "image", "target", "phrasing", "level", "split", "dice", "iou", "presence",
    "area_true", "area_pred", "absent", "agreement", "flips",
)  # fmt: skip


def check_name(model):
    if not getattr(model, "name", None):
        raise ModelError(f"{type(model).__name__} has no name, which every record shows; set one: model.name = 'ours'")


def choose(bank, target, levels, split, per_level):
    if per_level is not None and per_level < 1:
        raise SettingsError(f"per_level is {per_level}; it must be at least 1, or None for all phrasings")
    if split == "foils":  # asked as if they were phrasings of the target that they resemble
        return [Phrasing(f.text, target, "foil", "foils", "", f.text) for f in bank.foils if f.target == target]
    chosen = []
    for level in levels:
        found = bank.select(target, levels=(level,), split=split)
        if not found:
            raise BankError(f"bank {bank.name!r} has no {split} phrasing of level {level} for target {target!r}")
        keep = len(found) if per_level is None else min(per_level, len(found))
        chosen += [found[i] for i in np.linspace(0, len(found) - 1, keep).round().astype(int)]
    return chosen


@torch.inference_mode()
def predict_packed(model, sample, texts, text_features):
    """The masks of one image for all phrasings, as packed bits [P, N], and presence probabilities [P]."""
    if text_features is None:  # a model from outside that has only `predict`
        outputs = [(model.predict(sample.image, texts), len(texts))]
    else:
        image_features = model.encode_image(sample.image)  # once, however many phrasings follow
        chunks = (text_features[i : i + CHUNK] for i in range(0, len(texts), CHUNK))
        outputs = ((model.decode(image_features, chunk), len(chunk)) for chunk in chunks)
    return pack_answers(model, sample, outputs)


def pack_answers(model, sample, outputs):
    """outputs: each with the number of phrasings that it answers."""
    packed, presence = [], []
    for output, count in outputs:
        check_output(output, sample, model, count)
        packed.append(pack(output.masks[0].cpu().numpy()))
        presence.append(output.presence_logits[0].detach().float().sigmoid().cpu().numpy())
    return np.concatenate(packed), np.concatenate(presence)


def check_output(output, sample, model, count):
    if not isinstance(output, SegmentationOutput):
        raise ModelError(f"{model.name}: predict must return a SegmentationOutput, got {type(output).__name__}")
    if tuple(output.mask_logits.shape[-2:]) != sample.image.shape[:2]:
        raise ModelError(
            f"{model.name}: masks of {list(output.mask_logits.shape[-2:])} for image {sample.id} of "
            f"{list(sample.image.shape[:2])}; return logits at the size of the image"
        )
    found = [list(output.mask_logits.shape[:-2]), list(output.presence_logits.shape)]
    if found != [[1, count]] * 2:
        said = f"masks {found[0]} and presence {found[1]} for one image and {count} phrasings"
        raise ModelError(f"{model.name}: {said}; return mask_logits [1, {count}, H, W], presence_logits [1, {count}]")
    if output.mask_logits.isnan().any() or output.presence_logits.isnan().any():
        raise ModelError(f"{model.name}: NaN in the logits for image {sample.id}; the model or its weights are broken")


def group_rows(sample, target, phrasings, packed, presence):
    """The records of one prompt group: K phrasings, one true mask, if it is known. packed [K, N], presence [K]."""
    truth, pixels = sample.masks.get(target), sample.image.shape[0] * sample.image.shape[1]
    fits = overlaps = np.full(len(packed), np.nan)
    true_area = np.nan
    if truth is not None:
        true, true_area = pack(truth), truth.mean()  # [N]
        fits, overlaps = dice(packed, true), iou(packed, true)
    columns = zip(
        phrasings, fits, overlaps, presence, areas(packed) / pixels, group_agreement(packed), strict=True
    )  # fmt: skip
    flips = flip_share(packed, pixels)
    return [
        dict(
            image=sample.id, target=target, phrasing=phrasing.text, level=phrasing.level, split=phrasing.split,
            dice=fit, iou=overlap, presence=float(present), area_true=true_area, area_pred=area,
            absent=true_area == 0, agreement=agreement, flips=flips,
        )
        for phrasing, fit, overlap, present, area, agreement in columns
    ]  # fmt: skip


STATISTICS = ("mean", "sd", "range", "worst", "agreement", "flips", "false_area")


def robustness(records, by=("segmenter", "target"), resamples=1000, seed=0):
    """How good the masks are and how much they move with wording, a row per group of records.

    mean        Dice over phrasings and the images that have the target
    sd, range   spread of Dice over the phrasings of one image, then the mean over images
    worst       mean Dice of the worst phrasing, named in `worst_phrasing`
    agreement   mean pairwise IoU between the masks of one group
    flips       share of the image on which a group does not agree
    false_area  share of the image that is marked where the target is absent
    Each with `_low` and `_high`: a 95 % bootstrap interval over source images (tiles of one image stay together).
    """
    missing = [name for name in (*by, *COLUMNS[2:5], "dice", "absent") if name not in records]
    if missing:
        raise SettingsError(f"these records have no column {missing[0]!r}; use the table that evaluate() returns")
    records = records.assign(image=records["image"].astype(str))  # a table that was read may have numbers there
    rows = []
    for key, part in records.groupby(list(by), sort=False):
        row = dict(zip(by, key, strict=True))
        refuse_mixtures(part, row)
        present, absent = part[~part["absent"]], part[part["absent"]]
        if len(present):
            row |= present_statistics(present, resamples, seed)
        if len(absent):
            area = absent.groupby("image", sort=False)["area_pred"].mean()
            row |= with_interval("false_area", *resample(area.to_frame(), resamples, seed))
        row["images"] = part["image"].nunique()
        rows.append(row)
    table = pd.DataFrame(rows)
    order = [name + end for name in STATISTICS for end in ("", "_low", "_high")]
    return table.reindex(columns=[*by, *order, "worst_phrasing", "images"])


def refuse_mixtures(part, row):
    """Two models of one name, or two data sets with images of one name, would be averaged into a model that is not."""
    asked = ["image", "target", "phrasing"]
    answers = part.drop_duplicates([*asked, "dice"])
    twice = answers[answers.duplicated(asked)]
    if len(twice):
        where = ", ".join(f"{name} {value}" for name, value in row.items())
        image, _, phrasing = twice[asked].iloc[0]
        raise SettingsError(
            f"the records of {where} hold two answers to {phrasing!r} on image {image}; if they are of several models "
            "or data sets, tell these apart with .assign(method=...) and by=('method', 'target')"
        )


def present_statistics(records, resamples, seed):
    fit = records.pivot_table(index="image", columns="phrasing", values="dice", sort=False)  # [images, K]
    per_image = records.groupby("image", sort=False)[["agreement", "flips"]].mean()
    per_image = per_image.reindex(fit.index).assign(
        mean=fit.mean(axis=1), sd=fit.std(axis=1, ddof=0), range=fit.max(axis=1) - fit.min(axis=1)
    )
    statistics = {}
    estimate, samples = resample(per_image, resamples, seed)
    for i, name in enumerate(per_image):
        statistics |= with_interval(name, estimate[[i]], samples[:, [i]])
    estimate, samples = resample(fit, resamples, seed)  # of each phrasing's mean
    statistics |= with_interval("worst", estimate.min(keepdims=True), samples.min(axis=1, keepdims=True))
    return statistics | {"worst_phrasing": fit.columns[int(estimate.argmin())]}


def resample(per_image, resamples, seed):
    """Mean over images [M] and its bootstrap samples [n, M]; an index `source@y,x` is a tile of `source`."""
    source, sources = pd.factorize(per_image.index.map(source_of))
    values, sums = per_image.to_numpy(float), np.zeros((len(sources), per_image.shape[1]))  # [images, M], [sources, M]
    known, counts = ~np.isnan(values), np.zeros_like(sums)
    np.add.at(sums, source, np.where(known, values, 0))
    np.add.at(counts, source, known)
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate = sums.sum(0) / counts.sum(0)
        # The same seed draws the same sources, so the quotient is the mean over the tiles drawn.
        samples = bootstrap_means(sums, resamples, seed) / bootstrap_means(counts, resamples, seed)
    return estimate, samples


def with_interval(name, estimate, samples):
    low, high = interval(samples)  # [1] each
    return {name: float(estimate[0]), f"{name}_low": float(low[0]), f"{name}_high": float(high[0])}
