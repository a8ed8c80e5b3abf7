"""Candidate masks of one answer, and the annotator who is simulated: grades by overlap, and at times the wrong way."""

import numpy as np
import torch

from ..errors import SettingsError

THRESHOLDS = (0.3, 0.4, 0.5, 0.6)


def by_threshold(logits, thresholds=THRESHOLDS):
    """Masks of one probability map at several thresholds: nested, the largest first. [N, H, W] -> bool [N, C, H, W]"""
    if not all(0 < t < 1 for t in thresholds) or list(thresholds) != sorted(set(thresholds)):
        raise SettingsError(f"thresholds are {list(thresholds)}; give rising probabilities between 0 and 1")
    return logits.detach().sigmoid()[:, None] > logits.new_tensor(thresholds)[:, None, None]


def overlap(candidates, truth):
    """IoU of candidates bool [N, C, H, W] with masks bool [N, H, W] -> [N, C]; two empty masks agree, as in metrics."""
    truth = truth[:, None]
    whole = (candidates | truth).sum((-2, -1))
    return torch.where(whole > 0, (candidates & truth).sum((-2, -1)) / whole.clamp_min(1), 1.0)


def flip(grades, share, generator):
    """The verdict on a `share` of the requests turned round: best and worst change places, a 4 becomes a 1. [N, C]

    Both gradings are symmetric about zero, so a verdict turned round is its negative.
    """
    if not 0 <= share <= 1:
        raise SettingsError(f"the share of flipped verdicts is {share}; give a number from 0 to 1")
    wrong = torch.from_numpy(generator.random(len(grades)) < share).to(grades.device)
    return torch.where(wrong[:, None], -grades, grades)


def with_rater(rater):
    """A scorer from any function (image uint8 [H, W, 3], mask bool [H, W]) -> score, 0 to 1: no truth is needed."""

    def score(asked, candidates):
        each = len(candidates) // len(asked.images)  # requests of one image stand together
        found = [
            [float(rater(asked.images[n // each], mask)) for mask in masks]
            for n, masks in enumerate(candidates.cpu().numpy())
        ]
        if not np.isfinite(found).all():
            raise SettingsError("the rater gave a score that is not a number; let it return a float from 0 to 1")
        return torch.tensor(found, device=candidates.device)

    return score


def with_truth(asked, candidates):
    """The simulated annotator's scorer: IoU with the true mask."""
    each = len(candidates) // len(asked.masks)
    return overlap(candidates, asked.masks.repeat_interleave(each, 0))
