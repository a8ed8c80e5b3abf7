"""The oracle: Dice guessed from an image and a mask alone, and the masks that it learns from.

Five convolutions with batch normalisation and leaky ReLU between them and a sigmoid behind, as in the paper; widths,
strides and how a map becomes one number the paper leaves open. Here: halved five times, then the mean.
"""

import copy
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt

from ..errors import SettingsError, TrainingError
from ..metrics import dice, pack

WIDTHS = (16, 32, 32, 64)
LEVEL_SETS = 16  # masks a film that are too small or too large; with six of the model's own the paper's 22
OFFSET = 5  # px: how near to the border the clicks outside are


class Regressor(nn.Module):
    def __init__(self, channels=1):
        super().__init__()
        layers, widths = [], (channels + 1, *WIDTHS)
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, stride=2, padding=1))

    def forward(self, images, masks):
        """images [B, C, H, W] in 0..1, masks [B, H, W] in 0..1 -> the Dice that it expects [B]."""
        both = torch.cat([images - 0.5, masks[:, None] - 0.5], dim=1)  # [B, C + 1, H, W]
        return self.layers(both).mean((1, 2, 3)).sigmoid()


def level_sets(truth, count, rng):
    """`count` masks [count, H, W] cut from the distance map of the truth: one half too small, the other too large."""
    check_border(truth)
    inside, outside = distance_transform_edt(truth), distance_transform_edt(~truth)
    shares = (np.arange(count // 2) + rng.random(count // 2)) / (count // 2)
    deep = [inside > share * 0.9 * inside.max() for share in shares]
    wide = [outside <= share * inside.max() * 1.2 for share in shares]
    return np.stack(deep + wide)


def check_border(truth):
    if not truth.any() or truth.all():
        raise SettingsError("a mask is empty or fills the whole image; level sets and clicks beside it need a border")


def six_points(truth, rng):
    """[6, 2] as x, y: the centroids of three horizontal bands of the mask, then three points close outside of it."""
    check_border(truth)
    rows = np.flatnonzero(truth.any(1))
    edges = np.linspace(rows[0], rows[-1] + 1, 4).round().astype(int)
    bands = [np.argwhere(truth[a:b]).mean(0) + np.array([a, 0]) for a, b in pairwise(edges) if truth[a:b].any()]
    distance = distance_transform_edt(~truth)
    near = np.argwhere((distance > 0) & (distance <= OFFSET))
    points = np.array(bands + [near[rng.integers(len(near))] for _ in range(6 - len(bands))])
    return points[:, ::-1].astype(np.float32).copy()


def centroid(truth):
    """x, y of the middle of a mask: where the paper's user clicks."""
    return np.argwhere(truth).mean(0)[::-1].astype(np.float32).copy()


def true_dice(masks, truth):
    """[N, H, W] against [H, W] -> [N]."""
    return dice(pack(np.asarray(masks)), pack(np.asarray(truth)))


class Examples(NamedTuple):
    """Masks of known Dice. An image has many, and is kept once."""

    images: torch.Tensor  # [V, C, H, W] in 0..1
    which: torch.Tensor  # [M], the image of each mask
    masks: torch.Tensor  # bool [M, H, W]
    fits: torch.Tensor  # [M], their true Dice

    def at(self, part):
        return self.images[self.which[part]], self.masks[part].float()


def fit(examples, validation, epochs, seed=0):
    """A regressor of Dice by mean squared error on Examples; the epoch with the least validation loss is kept.

    Adam at 0.001 with batches of 32, as in the paper.
    """
    if epochs < 1:
        raise SettingsError(f"epochs is {epochs}; it must be at least 1")
    torch.manual_seed(seed)
    device = examples.images.device
    model, least, best = Regressor(examples.images.shape[1]).to(device), float("inf"), None
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(examples.masks)).to(device)
        for part in order.split(32):
            if len(part) < 2:  # batch normalisation needs company
                continue
            loss = F.mse_loss(model(*examples.at(part)), examples.fits[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        error = validation_loss(model, validation)
        if error < least:
            least, best = error, copy.deepcopy(model.state_dict())
    if best is None:
        raise TrainingError("the regressor's validation loss was never finite; take another seed")
    model.load_state_dict(best)
    return model.eval()


@torch.no_grad()
def validation_loss(model, examples):
    parts = torch.arange(len(examples.masks), device=examples.masks.device).split(256)
    return F.mse_loss(torch.cat([model.eval()(*examples.at(part)) for part in parts]), examples.fits).item()


@torch.no_grad()
def score(model, images, masks):
    """[M, C, H, W], [M, H, W] -> [M], in portions."""
    model.eval()
    return torch.cat([model(i, m.float()) for i, m in zip(images.split(256), masks.split(256), strict=True)])
