"""`sam2` and `medsam`: they read no words, and are shown where the nuclei are, with prompts made from the true masks.

The paper's rows for visual prompts follow SAMPO (arXiv 2508.02464) and "prior work". Which prompts, how many per image
and where, the paper leaves unsaid; SAMPO's abstract speaks of sparse ones. Here every nucleus gets one, which is the
most that can be shown: an upper bound, for T2 close to T1. MedSAM's published 78.43 / 47.11 are far apart and SAM2's
zero-shot Dice is 36 to 47, so the paper's prompts were probably fewer. What its MedSAM row stands on, training for
each task, is not done here: the training of this module goes through words.
"""

import numpy as np
import torch
import torch.nn as nn
from scipy import ndimage

from ..errors import ModelError, SettingsError
from .access import to_square
from .base import SegmentationOutput, as_batch
from .lite import to_pixel_values
from .sam2 import EMPTY, PromptedMasks, Sam2Masks, at_half
from .tiles import check_tile, stitch, tile_boxes

VISUALS = {"boxes": "a box around every nucleus", "points": "a point in every nucleus"}


class SamMasks(PromptedMasks):
    """MedSAM is SAM with its decoder and encoder fine-tuned on medical images, and prepares an image in its own way."""

    model_class, hub_name, model_types = "SamModel", "wanglab/medsam-vit-base", ("sam",)

    def encode(self, pixel_values):
        """[B, 3, H, W] in -1..1 -> embeddings of B views.

        As MedSAM_Inference.py of github.com/bowang-lab/MedSAM does: a bicubic square, then each view stretched to 0..1
        by its own darkest and brightest value, without the mean and deviation that SAM takes off.
        """
        resized = to_square(pixel_values, self.input_size, "bicubic")
        resized = resized.clamp(*extremes(pixel_values))  # bicubic overshoots at edges
        low, high = extremes(resized)
        return [self.sam.vision_encoder((resized - low) / (high - low).clamp(min=1e-8)).last_hidden_state]


def extremes(pixel_values):
    return pixel_values.amin((1, 2, 3), keepdim=True), pixel_values.amax((1, 2, 3), keepdim=True)


class VisualSegmenter(nn.Module):
    """visual: "boxes", a box around every nucleus, or "points", a point in the middle of each.

    tile: images larger than this are cut and stitched; a nucleus that a border cuts is prompted in both tiles.
    Presence is the mean IoU that the model predicts for its masks, 0 where it was shown nothing: that a target is
    there is told by the prompts, never found out.
    """

    why_not_trained = "it takes visual prompts made from the true masks; train lite or sam3, which take words"
    masks_class: type[PromptedMasks]
    visuals = tuple(VISUALS)

    def __init__(self, masks, *, visual="boxes", tile=None):
        super().__init__()
        if visual not in self.visuals:
            raise SettingsError(f"{self.name} cannot be shown {visual!r}; choose {' or '.join(self.visuals)}")
        check_tile(tile)
        self.masks, self.visual, self.tile = masks, visual, tile
        self.visual_prompt = VISUALS[visual]

    @torch.inference_mode()
    def predict_from_masks(self, sample, targets):
        """The image of a `data.Sample` with the prompts of each target: mask_logits [1, T, H, W]."""
        self.eval()
        pixels = torch.from_numpy(as_batch(sample.image)).permute(0, 3, 1, 2)  # [1, 3, H, W]
        labels = np.stack([label_nuclei(sample, target) for target in targets])  # [T, H, W]
        size = tuple(pixels.shape[-2:])
        boxes = tile_boxes(*size, self.tile)
        views = [self.read_view(pixels[..., y0:y1, x0:x1], labels[:, y0:y1, x0:x1]) for y0, x0, y1, x1 in boxes]
        logits = stitch([maps for maps, _ in views], boxes, size)  # [T, H, W]
        scores = [torch.cat(of_target) for of_target in zip(*(scores for _, scores in views), strict=True)]
        presence = torch.stack([score.mean() if len(score) else score.new_zeros(()) for score in scores])  # [T]
        return SegmentationOutput(at_half(logits)[None], presence.clamp(0, 1).logit(eps=1e-6)[None])

    def read_view(self, pixels, labels):
        """One view, encoded once: mask logits [T, h, w], and for each target the scores of its prompts."""
        size = labels.shape[1:]
        embeddings = self.masks.encode(to_pixel_values(pixels.to(self.masks.device)))
        maps, scores = [], []
        for nuclei in labels:
            if nuclei.any():
                logits, score = self.masks.union(embeddings, size, **self.make_prompts(nuclei))
            else:
                logits, score = embeddings[0].new_full(size, EMPTY), embeddings[0].new_zeros(0)
            maps.append(logits)
            scores.append(score)
        return torch.stack(maps), scores

    def make_prompts(self, nuclei):
        if self.visual == "boxes":
            return {"boxes": torch.from_numpy(boxes_around(nuclei))}
        return {"points": torch.from_numpy(points_inside(nuclei))[:, None]}  # [N, 1, 2]

    def predict(self, image, prompts):
        said = f"{self.name} reads no words; call predict_from_masks(sample, targets)"
        raise ModelError(f"{said}, as evaluate does, or choose a segmenter that takes phrasings")

    def save_pretrained(self, folder):
        self.masks.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, checkpoint=None, device="cpu", **options):
        return cls(cls.masks_class.from_pretrained(checkpoint, device), **options).eval()


class Sam2Segmenter(VisualSegmenter):
    name, masks_class = "sam2", Sam2Masks


class MedSamSegmenter(VisualSegmenter):
    """MedSAM knows boxes only: it was trained with nothing else."""

    name, masks_class, visuals = "medsam", SamMasks, ("boxes",)


def label_nuclei(sample, target):
    """[H, W], a number per nucleus of the target, 0 elsewhere: the true instances, or else connected regions."""
    if sample.instances is None:
        return ndimage.label(sample.masks[target])[0]
    return np.where(sample.masks[target], sample.instances, 0)


def boxes_around(nuclei):
    """[N, 4] as x0, y0, x1, y1, the outermost pixels of each nucleus included."""
    windows = [window for window in ndimage.find_objects(nuclei) if window]
    return np.array([(x.start, y.start, x.stop - 1, y.stop - 1) for y, x in windows], np.float32)


def points_inside(nuclei):
    """[N, 2] as x, y: the pixel of each nucleus that is farthest from its border, so never outside a bent one."""
    points = []
    for number, window in enumerate(ndimage.find_objects(nuclei), 1):
        if window:
            depth = ndimage.distance_transform_edt(np.pad(nuclei[window] == number, 1))
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            points.append((window[1].start + x - 1, window[0].start + y - 1))
    return np.array(points, np.float32)
