"""The same idea in words: a regressor scores the mask of every phrasing in the bank, and the best-scored is kept.

A phrasing has no coordinates to move, so nothing climbs: the bank is searched. What stays is the score, learned in the
same way, from level sets of the true masks and the model's own masks, and the same safeguard.
"""

import numpy as np
import torch
import torch.nn.functional as F

from ..evaluation import choose
from ..metrics import dice, group_agreement, majority, pack
from ..prompts import LEVELS
from .points import breaks, changes
from .regressor import LEVEL_SETS, Examples, fit, level_sets, score, true_dice

SIDE = 128  # px of what the regressor sees
SOURCES = ("as asked", "evolved", "evolved, safeguarded", "evolved, oracle", "majority of the bank")


def small(images):
    """uint8 [B, H, W, 3] -> [B, 3, SIDE, SIDE] in 0..1."""
    return F.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, (SIDE, SIDE), mode="area")


def small_masks(masks):
    """bool [M, H, W] -> [M, SIDE, SIDE] in 0..1."""
    return F.interpolate(torch.from_numpy(masks)[:, None].float(), (SIDE, SIDE), mode="area")[:, 0]


@torch.inference_mode()
def ask(model, image, texts):
    """One image, P phrasings -> masks bool [P, H, W], presence probabilities [P]."""
    answer = model.predict(image, texts)
    return answer.masks[0].cpu().numpy(), answer.presence_logits[0].float().sigmoid().cpu().numpy()


def inside_and_outside(bank, target):
    """Six training phrasings: a level each of the target, and three that ask for something else."""
    inside = [p.text for p in choose(bank, target, LEVELS, "train", 1)]
    others = [other for other in bank.targets if other != target]
    outside = [bank.fixed(others[i]) for i in np.linspace(0, len(others) - 1, 3).round().astype(int)]
    return inside + outside


def training_set(models, data, bank, target, seed):
    """Examples of small images and masks: level sets, and six masks of each model."""
    rng, images, rows = np.random.default_rng([seed, 11]), [], []
    texts = inside_and_outside(bank, target)
    for sample in data:
        truth = sample.masks[target]
        if not truth.any():  # Dice is 0 for every mask but the empty one: nothing to rank
            continue
        masks = np.concatenate([level_sets(truth, LEVEL_SETS, rng), *(ask(m, sample.image, texts)[0] for m in models)])
        which, fits = torch.full((len(masks),), len(images)), torch.from_numpy(true_dice(masks, truth))
        rows.append((which, small_masks(masks), fits))
        images.append(small(sample.image[None]))
    which, masks, fits = (torch.cat(part) for part in zip(*rows, strict=True))
    return Examples(torch.cat(images), which, masks, fits.float())


def fit_on(models, data, validation, bank, target, epochs, seed=0):
    sets = [training_set(models, part, bank, target, 2 * seed + n) for n, part in enumerate((data, validation))]
    return fit(*sets, epochs, seed)


def evolve(model, regressor, sample, target, asked, bank_texts):
    """What each of the K asked phrasings becomes when the bank is searched: a dict of arrays [K] and [K, ...].

    The bank's P phrasings and the asked one compete; the highest score wins. `dice` holds a row for each of SOURCES.
    """
    truth = sample.masks[target]
    masks, presence = ask(model, sample.image, [*asked, *bank_texts])  # [K + P, H, W]
    packed, known = pack(masks), len(asked)
    fits = dice(packed, pack(truth))  # [K + P]
    scores = score(regressor, small(sample.image[None]).expand(len(masks), -1, -1, -1), small_masks(masks)).numpy()
    pool = np.arange(known, len(masks))
    chosen = np.array([max([k, *pool], key=lambda i: scores[i]) for k in range(known)])
    agreement = np.array([group_agreement(packed[[i, *pool[pool != i]]])[0] for i in range(len(masks))])
    before, after = (
        {"masks": masks[which], "presence": presence[which], "agreement": agreement[which]}
        for which in (np.arange(known), chosen)
    )
    changed = changes(before, after)  # [K, 3]
    kept = np.where(breaks(changed).any(1), np.arange(known), chosen)
    common = dice(majority(packed[pool]), pack(truth))
    oracle = np.maximum(fits[:known], fits[pool].max())
    return {
        "dice": np.stack([fits[:known], fits[chosen], fits[kept], oracle, np.full(known, common)]),
        "scores": scores, "fits": fits, "chosen": chosen, "changed": changed, "masks": masks,
    }  # fmt: skip
