"""SAMPOT: Adam moves a point uphill on the score of its mask; then a safeguard asks whether to believe it."""

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import SettingsError
from ..metrics import group_agreement, pack
from .chest import TASK
from .regressor import LEVEL_SETS, Examples, centroid, fit, level_sets, six_points, true_dice

PIXELS = 2**18  # of the masks whose points move together: each film needs its own graph through the mask decoder
STEP = 10 / 1024  # of the side: ten pixels of SAM's frame, the reading of the paper's "step size 10" taken here
SLOPE = 10.0  # of the sigmoid that makes a mask nearly binary and still has a gradient
# What the safeguard asks, and the least that it accepts.
LIMITS = {"shared": 0.5, "presence": -0.05, "agreement": -0.05}


@dataclass
class Climb:
    """What T evaluations of B points gave. Best: the step with the highest score of each film."""

    points: np.ndarray  # [T, B, 2] as x, y
    scores: np.ndarray  # [T, B]
    confidence: np.ndarray  # [T, B], SAM's own
    masks: np.ndarray  # bool [T, B, H, W]

    @property
    def best(self):
        return self.scores.argmax(0)  # [B]

    def at(self, steps):
        """Points [B, 2] and masks [B, H, W] of one step a film."""
        films = np.arange(len(steps))
        return self.points[steps, films], self.masks[steps, films]


@dataclass
class Scene:
    """Films as tensors, encoded once."""

    images: torch.Tensor  # [B, 1, s, s] in 0..1, at the size of the masks
    embeddings: torch.Tensor  # [B, C, h, w]
    truth: np.ndarray  # bool [B, s, s]

    @property
    def side(self):
        return self.truth.shape[-1]


def encode(model, films):
    truth = np.stack([film.masks[TASK] for film in films])
    pixels = torch.from_numpy(np.stack([film.image for film in films]))  # [B, S, S]
    small = torch.nn.functional.interpolate(pixels[:, None] / 255, truth.shape[-2:], mode="area")
    return Scene(small.to(model.device), model.encode(pixels), truth)


def score_of(regressor, images, logits, slope=SLOPE):
    """The regressor's word on the soft masks: images [B, 1, s, s], logits [B, s, s] -> [B]."""
    return regressor(images, (slope * logits).sigmoid())


def climb(model, regressor, scene, start, steps, *, step=STEP, slope=SLOPE, by="regressor"):
    """Move one point a film, start [B, 2], uphill. by: "regressor", or "confidence" for SAM's own score."""
    if by not in ("regressor", "confidence"):
        raise SettingsError(f"a point cannot climb by {by!r}; choose regressor or confidence")
    if steps < 1 or not step > 0 or not slope > 0:
        raise SettingsError(f"steps, step and slope are {steps}, {step} and {slope}; all must be above zero")
    start = torch.as_tensor(start, dtype=torch.float32, device=scene.images.device)
    if not (start.ndim == 2 and start.isfinite().all() and (start >= 0).all() and (start <= scene.side - 1).all()):
        raise SettingsError(f"a start lies outside of its film; give x, y from 0 to {scene.side - 1} for each film")
    for part in (model, regressor):
        part.requires_grad_(False)  # only the points move
    films = max(1, PIXELS // scene.side**2)
    parts = [
        climb_together(model, regressor, *some, steps, step * scene.side, slope, by)
        for some in zip(*(kind.split(films) for kind in (scene.images, scene.embeddings, start)), strict=True)
    ]
    return Climb(*(np.concatenate(kind, axis=1) for kind in zip(*parts, strict=True)))


def climb_together(model, regressor, images, embeddings, start, steps, rate, slope, by):
    points, side, seen = start.clone().requires_grad_(), images.shape[-1], []
    optimiser = torch.optim.Adam([points], lr=rate, weight_decay=0)
    for _ in range(steps + 1):
        logits, confidence = (kind[:, 0] for kind in model.ask(embeddings, points[:, None], side))
        score = score_of(regressor, images, logits, slope) if by == "regressor" else confidence
        seen.append((points, score, confidence, logits > 0))
        seen[-1] = [kind.detach().cpu().numpy().copy() for kind in seen[-1]]
        optimiser.zero_grad()
        (-score.sum()).backward()  # films do not mix: each point has its own gradient, and Adam its own moments
        optimiser.step()
        with torch.no_grad():
            points.clamp_(0, side - 1)
    return [np.stack(kind) for kind in zip(*seen, strict=True)]


def search(model, regressor, scene, start, steps, rng):
    """The same budget without a gradient: the start, then points drawn from its mask, or the film if that is empty."""
    points = np.repeat(np.asarray(start, np.float32)[None], steps + 1, axis=0)  # [T, B, 2]
    first = ask(model, scene, points[:1].transpose(1, 0, 2))[0][:, 0]  # [B, s, s]
    for film, mask in enumerate(first > 0):
        spots = np.argwhere(mask if mask.any() else ~mask)
        points[1:, film] = spots[rng.integers(len(spots), size=steps)][:, ::-1]
    logits, confidence = ask(model, scene, points.transpose(1, 0, 2))  # [B, T, s, s], [B, T]
    device = scene.images.device
    with torch.no_grad():
        scores = [
            score_of(regressor, image.expand(len(own), -1, -1, -1), torch.from_numpy(own).to(device))
            for image, own in zip(scene.images, logits, strict=True)
        ]
    return Climb(points, torch.stack(scores, 1).cpu().numpy(), confidence.T, (logits > 0).transpose(1, 0, 2, 3))


@torch.no_grad()
def ask(model, scene, points):
    """Points [B, N, 2] -> mask logits [B, N, s, s] and confidence [B, N] as arrays."""
    answers = []
    for embedding, own in zip(scene.embeddings, points, strict=True):
        asked = torch.as_tensor(own, dtype=torch.float32, device=embedding.device)
        answers.append([kind[0].cpu().numpy() for kind in model.ask(embedding[None], asked[None], scene.side)])
    return [np.stack(kind) for kind in zip(*answers, strict=True)]


# ---- the safeguard ----


def changes(before, after):
    """What evolving did to each mask, [B, 3] in the order of LIMITS; both as `facts` gives them.

    shared     share of the smaller of the two masks that lies in the other: has it left the first one?
    presence   change of how sure the model is that the object is there: presence probability, or SAM's confidence
    agreement  change of the mean IoU with what neighbouring clicks, or other phrasings, give
    """
    overlap = [shared(a, b) for a, b in zip(before["masks"], after["masks"], strict=True)]
    return np.stack([overlap, *(after[name] - before[name] for name in ("presence", "agreement"))], axis=1)


def breaks(changed):
    """Which of LIMITS each evolved mask breaks: bool [B, 3]. A mask that breaks any is rejected."""
    return changed < np.array([*LIMITS.values()])


def shared(mask, other):
    """Share of the smaller mask that lies in the other one; 0 where one is empty."""
    return (mask & other).sum() / max(min(mask.sum(), other.sum()), 1)


def facts(model, scene, points):
    """What the safeguard asks about clicks [B, 2]: masks, presence and the agreement with eight clicks around each."""
    turn = np.arange(8) * np.pi / 4
    around = np.concatenate([[[0, 0]], np.stack([np.cos(turn), np.sin(turn)], 1) * 3 * STEP * scene.side])  # [9, 2]
    asked = (np.asarray(points)[:, None] + around).clip(0, scene.side - 1)  # [B, 9, 2]
    logits, confidence = ask(model, scene, asked)
    masks = logits > 0
    agreement = np.array([group_agreement(pack(group))[0] for group in masks])
    return {"masks": masks[:, 0], "presence": confidence[:, 0], "agreement": agreement}


# ---- what the regressor learns from ----


def candidates(model, scene, seed, own=True):
    """Masks of every film with their Dice: film index [M], source [M], masks bool [M, s, s], dice [M], confidence [M].

    Level sets, and with `own` the model's masks from three clicks in the lung and three close outside; confidence is
    known for these only.
    """
    rng, rows = np.random.default_rng([seed, 7]), []
    points = np.stack([six_points(truth, rng) for truth in scene.truth])  # [B, 6, 2]
    logits, confidence = ask(model, scene, points) if own else ([], [])
    for film, truth in enumerate(scene.truth):
        cut = level_sets(truth, LEVEL_SETS, rng)
        sources, sure = ["level set"] * len(cut), [np.nan] * len(cut)
        if own:
            cut = np.concatenate([cut, logits[film] > 0])
            sources += ["click inside"] * 3 + ["click outside"] * 3
            sure += [*confidence[film]]
        rows += zip([film] * len(cut), sources, cut, true_dice(cut, truth), sure, strict=True)
    films, sources, masks, fits, sure = zip(*rows, strict=True)
    return np.array(films), np.array(sources), np.stack(masks), np.array(fits), np.array(sure)


def fit_on(model, scenes, epochs, seed, own=True):
    """A regressor fitted to the candidates of a training scene and chosen on those of a validation scene."""
    sets = []
    for n, scene in enumerate(scenes):
        films, _, masks, fits, _ = candidates(model, scene, 2 * seed + n, own)
        films, masks, fits = (torch.from_numpy(kind).to(scene.images.device) for kind in (films, masks, fits))
        sets.append(Examples(scene.images, films, masks, fits.float()))
    return fit(*sets, epochs, seed)


def middles(scene):
    return np.stack([centroid(truth) for truth in scene.truth])
