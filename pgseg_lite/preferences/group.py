"""Preferences inside a prompt group: K phrasings of one request are its annotators.

The main paper names preference-based optimisation as future work; this is one form of it. Nobody says which mask is
right; the mask that agrees best with the others of its group is preferred, and every phrasing learns to prefer it.
"""

import torch

from ..models.base import THRESHOLD
from .candidates import overlap


def pairwise_overlap(masks):
    """IoU of every mask with every other of its group. bool [M, K, H, W] -> [M, K, K]"""
    return torch.stack([overlap(masks, masks[:, k]) for k in range(masks.shape[1])], dim=-1)


def agreement(masks):
    """Mean IoU with the others of the group, itself left out. bool [M, K, H, W] -> [M, K]"""
    return (pairwise_overlap(masks).sum(-1) - 1) / (masks.shape[1] - 1)


def with_group(asked, candidates):
    """A scorer without truth: a candidate's mean IoU with the answers that the other phrasings get from the reference.

    candidates [M * K, C, H, W] -> [M * K, C]
    """
    groups, k = asked.reference.shape[:2]
    answers = asked.reference > THRESHOLD  # [M, K, H, W]
    scores = torch.stack(
        [overlap(candidates, answers[:, other].repeat_interleave(k, 0)) for other in range(k)], dim=-1
    )  # [M * K, C, K]
    own = torch.eye(k, dtype=torch.bool, device=scores.device).repeat(groups, 1)[:, None]  # [M * K, 1, K]
    return scores.masked_fill(own, 0).sum(-1) / (k - 1)


class GroupPreferences:
    """A lesson: the K masks of a group are the candidates of each of its phrasings, graded by their agreement."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, asked):
        k = asked.reference.shape[1]
        masks = asked.reference > THRESHOLD  # [M, K, H, W]
        candidates = masks.repeat_interleave(k, 0)  # [M * K, K, H, W]: all of the group, for each phrasing
        grades = self.loss.grade(agreement(masks)).repeat_interleave(k, 0)
        return self.loss(asked.logits.flatten(0, 1), asked.reference.flatten(0, 1), candidates, grades).total
