"""SAMPOT's regressor in the annotator's place: the Dice of a mask, guessed by what the labelled images teach.

One for each target, since it is told image and mask and not what was asked for. It learns on views as the second stage
has them, from level sets of the true mask and from the model's own candidates; every fifth view validates.
"""

import numpy as np
import torch

from ..evolve.regressor import LEVEL_SETS, Examples, fit, level_sets, true_dice
from ..evolve.regressor import score as guess
from ..training import Collator, GroupDataset
from .candidates import by_threshold


def with_regressors(model, labelled, bank, settings, views, epochs):
    """A scorer like `candidates.with_truth`, but for the masks of a view that nobody has labelled.

    settings: TrainSettings of the views. A target that no labelled view shows is left without preference.
    """
    images, of_targets = examples(model, labelled, bank, settings, views)
    found = [fit_one(images, *rows, epochs, settings.seed) for rows in of_targets]

    def score(asked, candidates):
        targets, k = len(found), asked.reference.shape[1]
        images, masks = in_unit_range(asked.images), candidates.cpu().unflatten(0, (len(asked.images), targets, k))
        scores = torch.zeros(masks.shape[:4])  # [B, G, K, C]
        for g, regressor in enumerate(found):
            if regressor is None:
                continue
            own = masks[:, g].flatten(0, 2)  # [B * K * C, H, W]
            shown = images.repeat_interleave(len(own) // len(images), 0)
            scores[:, g] = guess(regressor, shown, own).reshape(scores[:, g].shape)
        return scores.flatten(0, 2).to(candidates.device)

    return score


@torch.no_grad()
def examples(model, labelled, bank, settings, views):
    """Views [V, 3, H, W], and for each target: the view [M] of each mask, masks bool [M, H, W] and their Dice [M]."""
    dataset, rng = GroupDataset(labelled, bank, settings, views), np.random.default_rng([settings.seed, 3])
    collate = Collator(model.encode_text(dataset.texts).cpu())
    images, rows = [], [[] for _ in labelled.targets]
    for index in range(views):
        item = dataset[index]
        images.append(item["image"])
        batch = collate([item])
        pixels, features = (batch[name].to(model.device) for name in ("pixel_values", "text_features"))
        logits = model(pixels, features).mask_logits[0]  # [G * K, H, W]
        answers = by_threshold(logits).unflatten(0, (len(rows), -1)).flatten(1, 2).cpu().numpy()  # [G, K * C, H, W]
        for own, truth, answered in zip(rows, item["masks"], answers, strict=True):
            if not truth.any() or truth.all():  # nothing to rank
                continue
            masks = np.concatenate([level_sets(truth, LEVEL_SETS, rng), answered])
            fits = torch.from_numpy(true_dice(masks, truth)).float()
            own.append((torch.full((len(masks),), index), torch.from_numpy(masks), fits))
    found = [[torch.cat(part) for part in zip(*own, strict=True)] if own else [torch.empty(0)] * 3 for own in rows]
    return in_unit_range(images), found


def fit_one(images, view, masks, fits, epochs, seed):
    held = view % 5 == 0
    if not held.any() or held.all():
        return None
    parts = (Examples(images, view[part], masks[part], fits[part]) for part in (~held, held))
    return fit(*parts, epochs, seed)


def in_unit_range(images):
    """A list of uint8 [H, W, 3] -> [B, 3, H, W] in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
