"""What every text-prompted model here has in common, and how many queries become one mask."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from ..errors import ModelError, SettingsError

# Chosen for Dice: where probabilities are calibrated, its best threshold is half the best Dice, so below one half; and
# focal loss with alpha 0.25 pulls likely pixels down besides. (SAM3's processor keeps queries, not pixels, from 0.3.)
THRESHOLD = math.log(0.3 / 0.7)


@dataclass
class SegmentationOutput:
    mask_logits: torch.Tensor  # [B, K, H, W], one map per image and phrasing
    presence_logits: torch.Tensor  # [B, K], is the target in the image at all?

    @property
    def masks(self):
        """Boolean [B, K, H, W]: probability above 0.3. Presence gates a mask only where `aggregate` put it in."""
        return self.mask_logits > THRESHOLD


@runtime_checkable
class Segmenter(Protocol):
    """A model from outside joins by having `name` and these four, or just `name` and `predict`."""

    name: str

    def encode_image(self, images): ...  # once per image

    def encode_text(self, prompts): ...  # once per phrasing

    def decode(self, image_features, text_features): ...  # every image with every phrasing

    def predict(self, image, prompts): ...


def as_batch(images):
    """uint8 [B, H, W, 3] from one image, a list of equally large ones, or a batch."""
    if isinstance(images, (list, tuple)) and len({np.shape(image) for image in images}) != 1:
        raise ModelError(f"{len(images)} images of one size are needed, as one batch; ask for others one at a time")
    batch = np.stack(images) if isinstance(images, (list, tuple)) else np.asarray(images)
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
        raise ModelError(
            f"an image must be uint8 of shape [height, width, 3], got {batch.dtype} {list(batch.shape)}; "
            "convert it first, for instance with PIL's convert('RGB')"
        )
    # torch takes neither a flipped view, such as OpenCV's image[:, :, ::-1], nor, without a warning, what is read-only.
    return np.require(batch, requirements=["C", "W"])


def check_prompts(prompts):
    """A list of non-empty strings, from a list or a single string."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ModelError(f"prompts must be one or more non-empty strings, got {prompts!r}; remove the empty ones")
    return prompts


AGGREGATIONS = ("max-logit", "max-score", "union", "semantic")


def aggregate(query_logits, scores, presence_logits=None, *, reading="max-logit", top_k=None, semantic_logits=None):
    """One mask per phrasing from Q query masks: the readings of "top-K selection and max-aggregation".

    query_logits [..., Q, H, W], scores [..., Q] (logits). Returns mask logits [..., H, W].
    max-logit  the top-K queries by score, then the highest mask logit at each pixel
    max-score  the highest product of score and mask probability at each pixel
    union      only queries whose score probability exceeds one half, then the highest mask logit
    semantic   the model's own semantic head, whatever the queries say
    With `presence_logits` [...] the probability of the map is multiplied by that of presence.
    """
    if reading not in AGGREGATIONS:
        raise SettingsError(f"aggregation {reading!r} is unknown; choose one of {', '.join(AGGREGATIONS)}")
    if reading == "semantic":
        if semantic_logits is None:
            raise SettingsError("aggregation 'semantic' needs semantic_logits, and this model gives none")
        logits = semantic_logits
    else:
        if top_k is not None:
            if not 1 <= top_k <= scores.shape[-1]:
                raise SettingsError(f"top_k is {top_k}; it must be 1 to {scores.shape[-1]}, the number of queries")
            scores, best = scores.topk(top_k, dim=-1)
            query_logits = query_logits.gather(-3, best[..., None, None].expand(*best.shape, *query_logits.shape[-2:]))
        if reading == "max-score":
            probability = (query_logits.sigmoid() * scores.sigmoid()[..., None, None]).amax(-3)
            logits = probability.logit(eps=1e-6)
        else:
            if reading == "union":
                query_logits = query_logits.masked_fill((scores <= 0)[..., None, None], -20.0)  # p below 1e-8
            logits = query_logits.amax(-3)
    if presence_logits is None:
        return logits
    return (logits.sigmoid() * presence_logits.sigmoid()[..., None, None]).logit(eps=1e-6)
