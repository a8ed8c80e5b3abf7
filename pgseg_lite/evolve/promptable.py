"""SAM, asked with one point for each mask, so that a gradient flows back to the point.

At lite it is a `transformers.SamModel` of 184 thousand parameters, trained here from scratch on clean phantoms;
at full the published weights. Both are loaded the same way.
"""

import torch
import torch.nn.functional as F

from ..errors import SettingsError, TrainingError
from ..models.access import LIKE_IMAGENET, of_transformers, standardise, to_square
from ..models.sam2 import PromptedMasks

SIDE = 64  # of the films that the tiny model takes
SIZES = {
    "vision_config": {
        "hidden_size": 48, "output_channels": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE,
        "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 24, "initializer_range": 0.02,
    },
    "prompt_encoder_config": {"hidden_size": 48, "image_size": SIDE, "patch_size": 8},
    "mask_decoder_config": {
        "hidden_size": 48, "mlp_dim": 96, "num_attention_heads": 4, "iou_head_hidden_dim": 48,
    },
}  # fmt: skip
PROMPTS, WHOLES = 4, 9  # clicks on a film in a training step; structures that are no ribs


class Promptable(PromptedMasks):
    """`transformers.SamModel`: films encoded once, then a mask for each point, with gradients to the points."""

    model_class, hub_name, model_types = "SamModel", "facebook/sam-vit-base", ("sam",)

    def encode(self, films):
        """uint8 [B, S, S] -> embeddings [B, C, h, w]; weights are never trained through this."""
        with torch.no_grad():
            return torch.cat([self.sam.vision_encoder(self.prepare(film[None])).last_hidden_state for film in films])

    def prepare(self, films):
        """uint8 [B, S, S] -> what SAM's encoder was trained on, [B, 3, S', S']."""
        grey = films.to(self.device, torch.float32)[:, None].expand(-1, 3, -1, -1) / 255
        return standardise(to_square(grey, self.input_size), LIKE_IMAGENET)

    def ask(self, embeddings, points, side):
        """Points [B, N, 2] as x, y in a square of `side` pixels -> mask logits [B, N, side, side], confidence [B, N].

        Of the three masks that SAM offers for a point, the one that it is most confident of.
        """
        output = self.sam(
            image_embeddings=embeddings, input_points=points[:, :, None] * (self.input_size / side),
            input_labels=torch.ones(points.shape[:2], dtype=torch.long, device=points.device)[..., None],
        )  # fmt: skip
        confidence, best = output.iou_scores.max(-1)  # [B, N]
        masks = output.pred_masks  # [B, N, 3, h, w]
        masks = masks.gather(2, best[..., None, None, None].expand(-1, -1, 1, *masks.shape[3:]))[:, :, 0]
        return F.interpolate(masks, (side, side), mode="bilinear"), confidence


def tiny(seed=0):
    """The tiny model with new weights."""
    config, model = of_transformers("SamConfig", "SamModel")
    torch.manual_seed(seed)
    sam = model(config(**SIZES))
    with torch.no_grad():  # transformers draws frequencies that wave many times between two pixels; SAM's own have sd 1
        sam.shared_image_embedding.positional_embedding.div_(sam.config.vision_config.scale)
    return Promptable(sam)


def train_promptable(films, steps, seed=0, batch=8):
    """A tiny model trained as SAM was: points in any structure, the best of three masks, its IoU predicted too."""
    if steps < 1:
        raise SettingsError(f"steps is {steps}; it must be at least 1")
    model, generator = tiny(seed).train(), torch.Generator().manual_seed(seed)
    images = torch.from_numpy(stack(film.image for film in films))  # [F, S, S]
    shapes = [torch.from_numpy(stack(film.masks.values())) for film in films]  # each [structures, S, S]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        points, truth = zip(*(draw_points(shapes[i], generator) for i in chosen), strict=True)
        loss = sam_loss(model, images[chosen], torch.stack(points), torch.stack(truth))
        if not loss.isfinite():
            raise TrainingError(f"the loss of the promptable model is {loss.item()}; take another seed")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def sam_loss(model, images, points, truth):
    """images [B, S, S], points [B, N, 2], truth bool [B, N, S, S]: cross-entropy and Dice loss of the best of three."""
    labels = torch.ones(points.shape[:2], dtype=torch.long)[..., None]
    output = model.sam(model.prepare(images), input_points=points[:, :, None], input_labels=labels)
    logits = output.pred_masks  # [B, N, 3, h, w]
    truth = F.interpolate(truth.float(), logits.shape[-2:], mode="area")[:, :, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((-2, -1))  # [B, N, 3]
    soft = logits.sigmoid()
    dice = 1 - (2 * (soft * truth).sum((-2, -1)) + 1) / ((soft + truth).sum((-2, -1)) + 1)
    with torch.no_grad():
        hard, true = logits > 0, truth > 0.5
        overlap = (hard & true).sum((-2, -1)) / (hard | true).sum((-2, -1)).clamp(min=1)
    confidence = F.mse_loss(output.iou_scores, overlap)
    return (entropy + dice).amin(-1).mean() + confidence


def draw_points(shapes, generator):
    """PROMPTS of a film: each in a structure drawn among those there, on any of its pixels."""
    points, chosen = [], torch.randint(len(shapes), (PROMPTS,), generator=generator)
    chosen[:3] %= WHOLES  # every second click is on what comes first in a film: there are many more ribs
    for shape in shapes[chosen]:
        spots = shape.nonzero()
        y, x = spots[torch.randint(len(spots), (1,), generator=generator)[0]]
        points.append(torch.stack([x, y]))
    return torch.stack(points).float(), shapes[chosen]


def stack(arrays):
    import numpy as np

    return np.stack(list(arrays))
