"""Two stages of one loop: supervised on a share of the labels, then preferences on the rest of the images.

A step asks a batch of B views for G targets in K phrasings each; a lesson turns the answers into a loss.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..errors import SettingsError, TrainingError
from ..losses import GroupLoss, consistency_term
from ..models.base import THRESHOLD
from ..settings import TrainSettings
from ..training import Collator, GroupDataset
from .candidates import THRESHOLDS, by_threshold, flip, with_truth
from .loss import PreferenceLoss

FOCAL, DICE = 20.0, 1.0


@dataclass(frozen=True)
class StageSettings:
    steps: int = 60  # stand for all `epochs`
    batch_size: int = 4
    view: int = 96
    k: int = 1  # phrasings a target
    learning_rate: float = 1e-4
    epochs: int = 30
    halve_every: int = 10  # epochs
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "k", "epochs", "halve_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate is {self.learning_rate}; it must be above zero")

    def rate(self, step):
        return self.learning_rate * 0.5 ** (step * self.epochs // self.steps // self.halve_every)


@dataclass
class Asked:
    """What a lesson sees of one step. M = B * G groups, those of one image together."""

    images: list  # B x uint8 [H, W, 3]
    masks: torch.Tensor  # bool [M, H, W], the truth
    logits: torch.Tensor  # [M, K, H, W]
    presence: torch.Tensor  # [M, K]
    reference: torch.Tensor | None  # [M, K, H, W], of the frozen model; None in the first stage
    generator: np.random.Generator


def divide(data, fraction, seed=0):
    """(labelled, rest) of a dataset, by source image: what 10 % holds, 20 % holds too."""
    if not 0 < fraction < 1:
        raise SettingsError(f"the labelled share is {fraction}; give a number between 0 and 1")
    rest, labelled = data.hold_out(fraction, seed)
    return labelled, rest


def first_stage(model, data, bank, settings, prompts=None, loss=None):
    """Supervised training of the whole model, in place."""
    lesson = Supervised(loss) if loss else Supervised()
    return _learn(model.train(), None, list(model.parameters()), data, bank, settings, lesson, prompts).eval()


def second_stage(model, data, bank, settings, lesson, prompts=None):
    """`lesson` on images without labels: the decoder of `lite` is trained in place, a frozen copy is the reference.

    Dropout stays off: with it the policy would differ from the reference before anything is learnt.
    """
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    frozen = [*model.image_encoder.stem.parameters(), *model.image_encoder.down.parameters()]
    for parameter in (*frozen, *model.image_encoder.to_image.parameters()):
        parameter.requires_grad_(False)
    decoder = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learnt = _learn(model.eval(), reference, decoder, data, bank, settings, lesson, prompts)
    return learnt.requires_grad_()


def _learn(model, reference, parameters, data, bank, settings, lesson, prompts):
    how = TrainSettings(
        steps=settings.steps, batch_size=settings.batch_size, view=settings.view, k=settings.k, seed=settings.seed
    )
    views = GroupDataset(data, bank, how, settings.steps * settings.batch_size)
    table = model.encode_text(views.texts).cpu()
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=how.weight_decay)
    generator = np.random.default_rng([settings.seed, 2])
    torch.manual_seed(settings.seed)
    for step, batch in enumerate(DataLoader(views, settings.batch_size, collate_fn=Collator(table))):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total = lesson(ask(model, reference, batch, generator, prompts))
        if not torch.isfinite(total):
            raise TrainingError(f"the loss became {total.item()} at step {step}; lower the learning rate")
        if total.requires_grad:  # a batch in which no candidate is preferred teaches nothing
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return model


def ask(model, reference, batch, generator, prompts=None):
    """The answers of the model, and of its reference, to one batch."""
    b, g, k = batch["text_ids"].shape
    pixels, features, boxes = batch["pixel_values"], batch["text_features"], None
    images = list(((pixels + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy())
    if prompts:
        features, boxes = prompts(features, images)

    def answer(asked):
        output = asked(pixels, features)
        maps = output.mask_logits if boxes is None else inside(output.mask_logits, boxes)
        return maps.reshape(b * g, k, *maps.shape[-2:]), output.presence_logits.reshape(b * g, k)

    logits, presence = answer(model)
    with torch.no_grad():
        before = answer(reference)[0] if reference else None
    return Asked(images, batch["masks"].flatten(0, 1), logits, presence, before, generator)


def inside(logits, boxes):
    """Nothing is marked outside a box: [B, K, H, W] with a box (top, left, bottom, right) or None an image."""
    kept = torch.zeros(len(logits), 1, *logits.shape[-2:], dtype=torch.bool, device=logits.device)
    for n, box in enumerate(boxes):
        top, left, bottom, right = box or (0, 0, *logits.shape[-2:])
        kept[n, :, top:bottom, left:right] = True
    return logits.masked_fill(~kept, -10.0)


class Supervised:
    """A lesson with labels: focal : Dice as 20 : 1, one phrasing weighing as much as another."""

    def __init__(self, loss=None):
        self.loss = loss or GroupLoss(group="none", consistency="none", mask_weight=FOCAL, dice_weight=DICE)

    def __call__(self, asked):
        return self.loss(asked.logits, asked.presence, asked.masks).total


class OwnMasks(Supervised):
    """Self-training: the reference's own masks stand in for labels. What preferences must beat."""

    def __call__(self, asked):
        losses = [
            self.loss(asked.logits[:, [k]], asked.presence[:, [k]], asked.reference[:, k] > THRESHOLD).total
            for k in range(asked.logits.shape[1])
        ]
        return torch.stack(losses).mean()


class Consistency:
    """The group's consistency term alone, which needs no labels either."""

    def __init__(self, reading="first"):
        self.reading = reading

    def __call__(self, asked):
        return consistency_term(asked.logits, self.reading)


class Preferences:
    """A lesson without labels: candidates of the reference by threshold, graded by `score`, then the loss."""

    def __init__(self, loss=None, thresholds=THRESHOLDS, score=with_truth, flipped=0.0, own=False):
        self.loss, self.thresholds, self.score = loss or PreferenceLoss(), thresholds, score
        self.flipped, self.own = flipped, own  # own: candidates of the policy as it changes

    def __call__(self, asked):
        logits, reference = asked.logits.flatten(0, 1), asked.reference.flatten(0, 1)  # [N, H, W]
        candidates = by_threshold(logits if self.own else reference, self.thresholds)
        grades = flip(self.loss.grade(self.score(asked, candidates)), self.flipped, asked.generator)
        return self.loss(logits, reference, candidates, grades).total
