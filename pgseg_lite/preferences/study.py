"""`pgseg experiment preferences`: label shares with and without preferences, and what the answer hangs on."""

from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pandas as pd
import torch

from ..data.dataset import source_of
from ..evaluation import choose
from ..experiments import CONSEP, START, Data
from ..keys import TRAINS, code_digest, code_of, hash_of
from ..losses import GroupLoss
from ..metrics import dice, group_agreement, pack
from ..models import load_segmenter
from ..prompts import LEVELS, PromptBank
from ..settings import TrainSettings
from ..studies import Study
from . import stages
from .cells import CELLS
from .group import GroupPreferences, with_group
from .loss import PreferenceLoss
from .rater import with_regressors
from .sources import Fused
from .stages import Consistency, OwnMasks, Preferences, StageSettings, Supervised

CUTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)  # where a probability becomes a mask
GIVEN = 0.3  # the cut of the masks of this book, where agreement is measured
FIRST = {
    "smoke": StageSettings(steps=2, batch_size=1, view=32, learning_rate=1e-3, epochs=15),
    "lite": StageSettings(steps=90, view=64, learning_rate=1e-3, epochs=15),
    "full": StageSettings(steps=1500, batch_size=16, view=256, learning_rate=1e-3, epochs=15),
}
SECOND = {
    "smoke": StageSettings(steps=2, batch_size=1, view=32),
    "lite": StageSettings(steps=45, view=64),
    "full": StageSettings(steps=3000, batch_size=16, view=256),
}
RATER = {"smoke": dict(views=10, epochs=1), "lite": dict(views=60, epochs=10), "full": dict(views=2000, epochs=30)}
PER_LEVEL = {"smoke": 1, "lite": 2, "full": 10}  # unseen phrasings a target and level
TILES = {"smoke": 1, "lite": 2, "full": 64}  # of 128 px, tested of each test image
SEEN = 12  # labelled tiles on which a cut is chosen


def lesson_of(cell, model, labelled, bank, settings, profile):
    """The lesson of the second stage, and whether it is held on the labelled images or on the rest."""
    kind = cell["second"]
    if kind == "preferences":
        changed = {name: cell[name] for name in ("thresholds", "flipped") if name in cell}
        if cell.get("score") == "group":
            changed["score"] = with_group
        if cell.get("score") == "regressor":
            views = TrainSettings(view=settings.view, k=settings.k, seed=settings.seed)
            changed["score"] = with_regressors(model, labelled, bank, views, **RATER[profile])
        return Preferences(PreferenceLoss(**cell.get("loss", {})), **changed), "rest"
    if kind == "group preferences":
        return GroupPreferences(PreferenceLoss()), "rest"
    if kind == "consistency":
        return Consistency(), "rest"
    if kind == "own masks":
        return OwnMasks(), "rest"
    return Supervised(), "labelled" if kind == "labels again" else "rest"


def trained_first(cell, labelled, bank, prompts, seed, profile, folder):
    """The model that has seen the labels; several cells start from the same one, so it is kept."""
    group = cell.get("first") == "group"
    settings = replace(FIRST[profile], seed=seed, k=cell["k"] if group else 1)
    loss = GroupLoss(mask_weight=stages.FOCAL, dice_weight=stages.DICE) if group else None
    decides = [asdict(settings), group, cell.get("prompts"), labelled.digest, bank.digest, code_digest(CODE)]
    kept = folder / f"first-{hash_of(decides)}"
    if (kept / "config.json").exists():
        return load_segmenter("lite", kept)
    model = load_segmenter("lite", START)
    stages.first_stage(model, labelled, bank, settings, prompts, loss).save_pretrained(kept)
    return model


def measure(cell, seed, profile, folder):
    """Both stages of a cell, and the test: a row an image and target, its Dice at each cut."""
    bank, (data, test) = PromptBank.load("nuclei"), images(profile)
    labelled, rest = stages.divide(data, cell.get("share", 0.1), seed)
    prompts = Fused(**cell["prompts"]) if cell.get("prompts") else None
    model = trained_first(cell, labelled, bank, prompts, seed, profile, folder)
    if cell.get("second"):
        settings = replace(SECOND[profile], seed=seed, k=1 if cell.get("first") else cell.get("k", 1))
        lesson, where = lesson_of(cell, model, labelled, bank, settings, profile)
        stages.second_stage(model, labelled if where == "labelled" else rest, bank, settings, lesson, prompts)
    labelled.ids = tuple(labelled.ids[i] for i in evenly(len(labelled), SEEN))
    seen = judged(model, labelled, bank, "train", PER_LEVEL[profile], prompts)
    table = judged(model, test, bank, "heldout", PER_LEVEL[profile], prompts)
    columns = [f"dice_{100 * cut:.0f}" for cut in CUTS]
    chosen = {
        all_of: seen.loc[(seen["target"] == "all") == all_of, columns].mean().idxmax() for all_of in (True, False)
    }
    best = [row[chosen[row["target"] == "all"]] for _, row in table.iterrows()]
    table = table.assign(dice_chosen=best, cut=[int(chosen[t == "all"][5:]) for t in table["target"]])
    table.attrs["datasets"] = [
        dict(name=d.name, split=d.split, digest=d.digest, tiles=len(d)) for d in (data, test)
    ]  # fmt: skip
    return table


@cache  # reading the images takes longer than a cell
def images(profile):
    """What is learnt from, and the tiles of the test images, evenly spaced within each."""
    test, by_image = Data("consep", options=dict(tile=128)).at(profile).load(), {}
    for name in test.ids:
        by_image.setdefault(source_of(name), []).append(name)
    test.ids = tuple(own[i] for own in by_image.values() for i in evenly(len(own), TILES[profile]))
    return CONSEP.at(profile).load(), test


def evenly(length, count):
    """At most `count` of the indices below `length`, evenly spaced and away from the ends."""
    return sorted({*((np.arange(count) + 0.5) / count * length).astype(int).tolist()})


@torch.inference_mode()
def judged(model, data, bank, split, per_level, prompts=None):
    """Mean Dice over phrasings and agreement of the group, a row a tile and target that is there, at every cut."""
    texts = {target: [p.text for p in choose(bank, target, LEVELS, split, per_level)] for target in data.targets}
    features, rows = model.encode_text([text for asked in texts.values() for text in asked]), []  # [P, 384]
    for sample in data:
        given, boxes = features[None], None
        if prompts:
            given, boxes = prompts(given, [sample.image])
        logits = model.decode(model.encode_image(sample.image), given).mask_logits
        p = (logits if boxes is None else stages.inside(logits, boxes))[0].sigmoid()
        for target, start in zip(texts, np.cumsum([0, *map(len, texts.values())]), strict=False):
            if not sample.masks[target].any():
                continue
            own, truth = p[start : start + len(texts[target])], pack(sample.masks[target])
            masks = {cut: pack((own > cut).cpu().numpy()) for cut in CUTS}
            fits = {f"dice_{100 * cut:.0f}": dice(packed, truth).mean() for cut, packed in masks.items()}
            agreement = group_agreement(masks[GIVEN]).mean()
            rows.append(dict(image=source_of(sample.id), target=target, agreement=agreement) | fits)
    return pd.DataFrame(rows).groupby(["image", "target"], sort=False).mean().reset_index().round(4)


CODE = (*TRAINS, *code_of("lite"), "metrics", "evaluation",
        *(f"preferences/{name}" for name in ("loss", "candidates", "group", "rater", "stages", "sources", "study")),
        "evolve/regressor")  # fmt: skip
STUDY = Study(
    about="few labels, then preferences among candidate masks, on CoNSeP",
    measure=measure,
    cells=CELLS,
    code=CODE,
    checkpoints=(START,),
    data=images,
)
