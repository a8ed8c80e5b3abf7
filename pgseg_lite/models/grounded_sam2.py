"""`grounded-sam2`: Grounding DINO finds boxes for a phrasing, SAM2 draws a mask in each, and their union is the answer.

    image    -> Grounding DINO's Swin backbone and SAM2's image encoder, each once per image
    phrasing -> BERT -> token features [L, D], once per phrasing, ever
    a pair   -> Grounding DINO's encoder and decoder -> boxes -> SAM2's mask decoder -> one map

A box has no gradient with respect to a mask, so the detector is frozen and only SAM2's mask decoder can be trained: it
learns to draw better in the boxes that it is given, and never which boxes a wording should give.
"""

import json
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import ModelError, SettingsError
from ..settings import BASELINE_PROFILES
from .access import OPTIONS_FILE, check_model_type, of_transformers, read_json, saving
from .grounding_dino import Detector
from .sam2 import EMPTY, Sam2Masks, at_half
from .tiles import ImageFeatures, TiledSegmenter, check_tile, tile_boxes

NAME = "grounded-sam2"
PARTS = ("detector", "masks")  # the two folders of a checkpoint
DECODER = "masks.sam.mask_decoder."
# What one mask for a box does not pass through: scores, and the three masks that SAM2 has for a click.
UNUSED = ("iou_prediction_head", "pred_obj_score_head", *(f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3)))
IDLE = tuple(f"{DECODER}{part}." for part in UNUSED)


class GroundedSam2Segmenter(TiledSegmenter):
    """box_threshold: how sure the detector must be of a box: 0.35, as in a demo of Grounded-SAM2's authors (0.4 in the
    one with transformers). Their second threshold, for text, only chooses the words written beside a box.

    tile: images larger than this are cut and stitched. truncate: cut phrasings of over 256 tokens, with a warning.

    A mask is where SAM2 says more than one half, as its authors have it: logits are moved so that this is the module's
    own threshold of 0.3. Presence is the score of the best box, above the threshold or not; without a box the mask is
    empty.
    """

    name = NAME
    default_settings = BASELINE_PROFILES["lite"]

    def __init__(self, detector, masks, *, box_threshold=0.35, tile=None, truncate=False):
        super().__init__()
        check_tile(tile)
        if not 0 < box_threshold < 1:
            raise SettingsError(f"box_threshold is {box_threshold}; it is a probability, above 0 and below 1")
        detector.text.truncate = truncate
        self.detector, self.masks, self.tile = detector, masks, tile
        self.options = {"box_threshold": box_threshold}

    @property
    def text(self):
        return self.detector.text

    @property
    def kept_outside(self):
        return self.detector.parts

    def _apply(self, *args, **kwargs):
        """What `to` and `cuda` call: the detector goes where the segmenter goes."""
        self.detector.move(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def forward(self, pixel_values, text_features):
        """pixel_values [B, 3, H, W] in -1..1, text_features [B, P, L, D + 1] -> SegmentationOutput."""
        size = tuple(pixel_values.shape[-2:])
        views = [[self.encode_view(image[None])] for image in pixel_values]
        output = self.decode(ImageFeatures(views, tile_boxes(*size), size), text_features)
        if torch.is_grad_enabled() and not output.mask_logits.requires_grad:
            # No box in the whole batch: a step that teaches nothing, and must still reach every trained parameter.
            whole = torch.tensor([[0, 0, size[1], size[0]]], device=pixel_values.device)
            output.mask_logits = output.mask_logits + 0 * self.masks.union(views[0][0][1], size, boxes=whole)[0]
        return output

    def encode_view(self, pixel_values):  # [1, 3, h, w] in -1..1
        return self.detector.encode(pixel_values), self.masks.encode(pixel_values)

    def ask(self, view, text_features, size):
        """One view with K phrasings: mask logits [K, *size], presence logits [K]."""
        features, embeddings = view
        boxes, presence = self.detector.find(features, text_features, size, self.options["box_threshold"])
        return at_half(torch.stack([self.draw(embeddings, size, of_one) for of_one in boxes])), presence

    def draw(self, embeddings, size, boxes):
        """The union of SAM2's masks in the boxes of one phrasing, logits [*size]."""
        if not len(boxes):
            return torch.full(size, EMPTY, device=boxes.device)
        if torch.is_grad_enabled():  # one phrasing's masks at a time are kept for the backward pass
            return recompute(self.masks.union, embeddings, size, boxes=boxes, use_reentrant=False)[0]
        return self.masks.union(embeddings, size, boxes=boxes)[0]

    def prepare_training(self, settings, texts, phrasings):
        """Freeze all but SAM2's mask decoder, and return the optimiser's parameter groups."""
        from .finetune import train_only

        self.text.check_lengths(texts)
        return train_only(self, settings, lambda name: name.startswith(DECODER) and not name.startswith(IDLE))

    @property
    def device(self):
        return self.masks.sam.no_memory_embedding.device

    def save_pretrained(self, folder):
        """Two transformers checkpoints, each in a folder of its own; the config.json on top last."""
        with saving(folder) as partial:
            self.detector.save_pretrained(partial / PARTS[0])
            self.masks.save_pretrained(partial / PARTS[1])
            (partial / OPTIONS_FILE).write_text(json.dumps(self.options, indent=2) + "\n")
            (partial / "config.json").write_text(json.dumps({"model_type": NAME}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, checkpoint=None, device="cpu", **options):
        """Both parts from the hub, or from a folder with `detector` and `masks` in it, as training writes it."""
        of_transformers("GroundingDinoForObjectDetection", "Sam2Model")  # both, before either is fetched
        detector, masks = (None, None) if checkpoint is None else two_folders(checkpoint)
        if checkpoint is not None:
            options = read_json(Path(checkpoint) / OPTIONS_FILE) | options
        return cls(Detector.from_pretrained(detector), Sam2Masks.from_pretrained(masks), **options).to(device).eval()


def two_folders(checkpoint):
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ModelError(f"{checkpoint}: no such checkpoint folder; give the folder that training wrote")
    if (folder / "config.json").is_file():
        check_model_type(folder, (NAME,))
    for part in PARTS:
        if not (folder / part).is_dir():
            said = f"not a checkpoint of {NAME}, the folder {part} in it is missing"
            raise ModelError(f"{folder}: {said}; give one that has {' and '.join(PARTS)}")
    return [folder / part for part in PARTS]
