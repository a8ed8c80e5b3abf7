"""Model x images x bank -> a measurement: a row per image, target and phrasing, with or without true masks."""

from contextlib import closing
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..data.dataset import Dataset
from ..data.files import IMAGES, FileSource, by_stem, listing
from ..errors import BankError, DataError, ModelError
from ..evaluation import COLUMNS, choose, group_rows
from ..metrics import areas, dice, flip_share, group_agreement, iou, majority, pack
from ..prompts import LEVELS
from .answers import Answers, image_key

GIVE_UP = 20  # failures before the first answer: the model is not there at all
IMAGES_WITHOUT = 3  # images in a row on which nothing is answered: it has gone
SAME = 0.5  # two targets whose true masks overlap more than this say nothing about whether words are heard


class Example(NamedTuple):
    agreement: float
    image: str
    pixels: np.ndarray  # uint8 [H, W, 3]
    truth: np.ndarray | None  # bool [H, W]
    phrasings: list
    packed: np.ndarray  # [K, N]


@dataclass
class Measurement:
    """`records` are those of `evaluate`, and for each row besides:
    level_agreement, level_flips   as agreement and flips, among the phrasings of its own level
    majority     Dice with the mask of the pixels that most phrasings of the target mark
    marked       whether that mask has any pixel
    toward_X     Dice with the mask of target X: the true one, or the majority's; NaN where that is empty
    `pairs`: image, first, second (targets) and the IoU of their majorities, where one of them is not empty.
    """

    about: dict  # model, fingerprint, bank, bank_digest, dataset, data_digest, truth, targets, levels, and
    #              phrasings: how many of the bank's were asked, and how many there are at these levels
    records: pd.DataFrame
    pairs: pd.DataFrame
    failures: pd.DataFrame  # image, phrasing, reason
    keys: dict  # image id -> digest of its pixels
    asked: int  # items, answered or not
    kept: int  # of them answered in an earlier call
    examples: dict  # target -> the Example whose masks agree least

    @property
    def fit(self):
        """The column that says how good a mask is: against the truth, or without it against the majority."""
        return "dice" if self.about["truth"] else "majority"


def open_pictures(folder, tile=256):
    """A folder of images without masks, as a dataset without targets. Each is read now, to know that it can be."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images; correct --images")
    files = by_stem(folder, IMAGES)
    if not files:
        raise DataError(f"{folder}: looked for png, tif, jpg or bmp and found {listing(folder)}; add images")
    source = FileSource(folder.resolve().name, (), {id: (path, None) for id, path in files.items()}, no_masks)
    for id in source.ids:
        source.read(id)
    return Dataset(source, "all", tile)


def no_masks(labels, path, shape):
    return {}, None


def measure(model, data, bank, levels=LEVELS, per_level=10, split=None, folder=None, quiet=False):
    """Ask an adapted model (see `adapt`) about every image in the bank's phrasings and in its foils.

    data: a dataset, or `open_pictures(...)` for images without masks. split: heldout or train phrasings, None for all.
    per_level: phrasings a target and level, drawn alike each time; None for all.
    folder: where answers are kept; a second call asks only what is not there. A failed item is asked again.
    """
    (phrasings, foils), (there, _) = (chosen(bank, data, levels, count, split) for count in (per_level, None))
    texts = list(dict.fromkeys(p.text for group in (phrasings, foils) for found in group.values() for p in found))
    wanted = set(texts)
    rows, pairs, failures, keys, examples, kept = [], [], [], {}, {}, 0
    silent = 0  # images in a row without an answer
    with closing(Answers(folder)) as answers, closing(model):
        progress = tqdm(total=len(data) * len(texts), desc="asking", unit="mask", disable=quiet)
        for sample in data:
            keys[sample.id] = key = image_key(sample.image)
            known = {text: answer for text, answer in answers.of(model.fingerprint, key).items() if text in wanted}
            failed = []
            kept += len(known)
            progress.update(len(known))
            for text, answer in model.answers(sample, [text for text in texts if text not in known]):
                progress.update()
                if answer.packed is None:
                    failed.append(dict(image=sample.id, phrasing=text, reason=answer.reason))
                    if not rows and not known and len(failed) + len(failures) >= GIVE_UP:
                        raise gone(model, failed[-1], "the first 20 items all failed")
                    continue
                known[text] = answer
                answers.keep(model.fingerprint, key, text, answer)
            failures += sorted(failed, key=lambda failure: texts.index(failure["phrasing"]))
            silent = 0 if known else silent + 1
            if silent == IMAGES_WITHOUT:
                raise gone(model, failed[-1], f"{silent} images in a row were not answered at all")
            groups = answered(phrasings, known)
            found = image_rows(sample, known, groups, foils)
            rows += found[0]
            pairs += found[1]
            keep_worst(examples, sample, groups)
        progress.close()
    if not rows:
        raise gone(model, failures[-1], "no item was answered") if failures else DataError(f"{data.name} has no images")
    about = dict(
        model=model.name, fingerprint=model.fingerprint, bank=bank.name, bank_digest=bank.digest,
        phrasings=[sum(map(len, found.values())) for found in (phrasings, there)], dataset=data.name,
        data_digest=image_key(np.frombuffer("".join(keys.values()).encode(), np.uint8))[:12], truth=bool(data.targets),
        targets=list(phrasings), levels=[level for level in LEVELS if level in levels],
    )  # fmt: skip
    records = pd.DataFrame(rows).assign(segmenter=model.name, dataset=data.name)
    order = [*COLUMNS, *(name for name in records if name not in COLUMNS)]
    return Measurement(
        about, records[order], pd.DataFrame(pairs, columns=["image", "first", "second", "iou"]),
        pd.DataFrame(failures, columns=["image", "phrasing", "reason"]), keys, len(data) * len(texts), kept,
        examples,
    )  # fmt: skip


def gone(model, failure, what):
    last = f"the last was {failure['phrasing']!r} on {failure['image']}: {failure['reason']}"
    return ModelError(f"{model.name}: {what}; {last}; mend the model and call again, what was answered is kept")


def chosen(bank, data, levels, per_level, split):
    """{target: phrasings} and {target: foils} to ask; a level that a target has nothing at is left out."""
    targets = [target for target in bank.targets if target in (data.targets or bank.targets)]
    if not targets:
        has = f"the dataset has {', '.join(data.targets)} and the bank {', '.join(bank.targets)}"
        raise BankError(f"bank {bank.name!r} and dataset {data.name!r} share no target: {has}; rename the bank's")
    phrasings = {}
    for target in targets:
        present = [level for level in levels if bank.select(target, (level,), split)]
        if not present:
            which = f"{split} phrasings" if split else "phrasings"
            raise BankError(f"bank {bank.name!r} has no {which} of {target!r} at {', '.join(levels)}; add some")
        listed = choose(bank, target, present, split, per_level)
        phrasings[target] = list({p.text: p for p in reversed(listed)}.values())[::-1]  # a text twice is asked once
    return phrasings, {target: choose(bank, target, (), "foils", None) for target in targets}


def answered(phrasings, answers):
    """{target: (phrasings that have an answer, their masks [K, N])}"""
    groups = {}
    for target, listed in phrasings.items():
        if group := [p for p in listed if p.text in answers]:
            groups[target] = group, stack(answers, group)
    return groups


def keep_worst(examples, sample, groups):
    for target, (group, packed) in groups.items():
        if len(group) > 1 and areas(packed).any() and sample.masks.get(target, np.True_).any():
            agreement = float(group_agreement(packed).mean())
            if target not in examples or agreement < examples[target].agreement:
                truth = sample.masks.get(target)
                examples[target] = Example(agreement, sample.id, sample.image, truth, [p.text for p in group], packed)


def image_rows(sample, answers, groups, foils):
    """The records of one image, and how much the masks of two targets overlap."""
    majorities = {target: majority(packed) for target, (_, packed) in groups.items()}
    pixels = sample.image[..., 0].size
    truths = {target: pack(mask) for target, mask in sample.masks.items()}
    references = {t: mask for t, mask in (truths or majorities).items() if t in groups and areas(mask)}
    rows = []
    for target, (group, packed) in groups.items():
        found = group_rows(sample, target, group, packed, [answers[p.text].presence for p in group])
        columns = {f"toward_{t}": dice(packed, mask) for t, mask in references.items()}
        columns |= dict(level_agreement=np.empty(len(group)), level_flips=np.empty(len(group)))
        levels = np.array([p.level for p in group])
        for level in np.unique(levels):
            at = levels == level
            columns["level_agreement"][at] = group_agreement(packed[at])
            columns["level_flips"][at] = flip_share(packed[at], pixels)
        for i, row in enumerate(found):
            row |= {name: values[i] for name, values in columns.items()}
        if asked := [f for f in foils[target] if f.text in answers]:
            packed = np.concatenate([packed, stack(answers, asked)])
            found += group_rows(sample, target, asked, packed[len(group) :], [answers[f.text].presence for f in asked])
        marked = bool(areas(majorities[target]))
        for row, fit in zip(found, dice(packed, majorities[target]), strict=True):
            rows.append(row | dict(majority=fit, marked=marked))
    pairs = []
    for a, b in combinations(majorities, 2):
        told_apart = not truths or iou(truths[a], truths[b]) < SAME
        if told_apart and (areas(majorities[a]) or areas(majorities[b])):
            pairs.append((sample.id, a, b, float(iou(majorities[a], majorities[b]))))
    return rows, pairs


def stack(answers, group):
    return np.stack([answers[p.text].packed for p in group])
