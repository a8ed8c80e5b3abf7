"""SAM2 as a tool: an image encoded once, and a mask for every box or point that somebody else names.

It reads no words. What names the objects is the true masks (visual.py), a detector (Grounding DINO) or a language model
that sees (reasoning.py). SAM, its predecessor, is asked the same way and shares everything but its encoder.
"""

from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from .access import LIKE_IMAGENET, fetch, load_model, normalise, of_transformers, to_square
from .base import THRESHOLD

AT_ONCE = 32  # prompts decoded together: each takes about 40 MB at the published size
EMPTY = -20.0  # the logit of a pixel that nothing covers


class PromptedMasks(nn.Module):
    """What SAM and SAM2 have in common. A subclass says how an image is encoded."""

    model_class: str
    hub_name: str
    model_types: tuple

    def __init__(self, sam):
        super().__init__()
        self.sam = sam
        self.input_size = sam.config.prompt_encoder_config.image_size  # 1024

    def union(self, embeddings, size, boxes=None, points=None, labels=None):
        """One view with N prompts, at least one -> their highest mask logit [*size], and predicted IoU, 0..1 [N].

        boxes [N, 4] as x0, y0, x1, y1, points [N, P, 2] as x, y with labels [N, P] (1 in the object, 0 outside of it;
        all 1 when left out), or both together, in pixels of the view of `size`. Never N maps at once.
        """
        union, scores = None, []
        for masks, score in self.in_portions(embeddings, size, boxes, points, labels):
            highest = masks.amax(0)
            union = highest if union is None else torch.maximum(union, highest)
            scores.append(score)
        return union, torch.cat(scores)

    def in_portions(self, embeddings, size, boxes=None, points=None, labels=None):
        prompts = boxes if points is None else points
        labels = torch.ones(points.shape[:2]) if points is not None and labels is None else labels
        edges = [*range(0, len(prompts), AT_ONCE), len(prompts)]
        for start, stop in pairwise(edges):
            portion = (None if x is None else x[start:stop] for x in (boxes, points, labels))
            yield self.read(embeddings, size, *portion)

    def read(self, embeddings, size, boxes, points, labels):
        """One pass of the mask decoder: mask logits [n, *size], scores [n]."""
        device = embeddings[-1].device
        stretch = torch.tensor([self.input_size / size[1], self.input_size / size[0]], device=device)  # of x and y
        if boxes is not None:
            boxes = boxes.to(stretch)[None] * stretch.repeat(2)  # [1, n, 4]
        if points is not None:
            points, labels = points.to(stretch)[None] * stretch, labels.to(device, torch.long)[None]  # [1, n, P, ...]
        with torch.autocast(device.type, enabled=False):  # bf16 would move the corner of a box by up to 4 pixels
            embeddings = [level.float() for level in embeddings]
            output = self.sam(
                image_embeddings=embeddings if len(embeddings) > 1 else embeddings[0],  # SAM has one level
                input_boxes=boxes, input_points=points, input_labels=labels,
                multimask_output=points is not None,  # a point may mean a part or the whole, a box means one object
            )  # fmt: skip
        scores, best = output.iou_scores[0].max(-1)  # [n]
        masks = output.pred_masks[0]  # [n, 1 or 3, h, w]
        masks = masks.gather(1, best[:, None, None, None].expand(-1, 1, *masks.shape[2:]))
        return F.interpolate(masks, size, mode="bilinear")[:, 0], scores

    @property
    def device(self):
        return self.sam.device

    def save_pretrained(self, folder):
        self.sam.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, checkpoint=None, device="cpu"):
        """From the hub by name, or from a folder of transformers' `save_pretrained`."""
        (model_class,) = of_transformers(cls.model_class)
        folder = fetch(cls.hub_name if checkpoint is None else checkpoint, cls.model_types)
        return cls(load_model(model_class, folder)).to(device).eval()


class Sam2Masks(PromptedMasks):
    """`transformers.Sam2Model`: embeddings once per view, then a mask for each box or point."""

    model_class, hub_name = "Sam2Model", "facebook/sam2.1-hiera-large"
    model_types = ("sam2", "sam2_video")  # the published files hold the video model; its image half is Sam2Model

    def encode(self, pixel_values):
        """[B, 3, H, W] in -1..1 -> embeddings of B views; `one_view` picks one of them."""
        pixels = normalise(to_square(pixel_values, self.input_size), LIKE_IMAGENET)
        features = self.sam.get_image_features(pixels, return_dict=True)
        # As Sam2Model.get_image_embeddings does, which would stop the gradients: [h * w, B, C] -> [B, C, h, w].
        levels = list(features.fpn_hidden_states)
        levels[-1] = levels[-1] + self.sam.no_memory_embedding
        sizes = self.sam.backbone_feature_sizes
        return [level.permute(1, 2, 0).unflatten(2, tuple(s)) for level, s in zip(levels, sizes, strict=True)]


def one_view(embeddings, i):
    """The embeddings of view i out of a batch's."""
    return [level[i : i + 1] for level in embeddings]


def at_half(logits):
    """For a `SegmentationOutput`, whose masks begin at a probability of 0.3: SAM's begin at one half, a logit of 0."""
    return logits + THRESHOLD
