"""Text-prompted segmenters: one small protocol, one loader."""

import inspect
import os
from importlib import import_module
from pathlib import Path

from ..errors import ModelError
from .base import AGGREGATIONS, SegmentationOutput, Segmenter, aggregate

__all__ = ["AGGREGATIONS", "BUNDLED", "SEGMENTERS", "SegmentationOutput", "Segmenter", "aggregate", "load_segmenter"]

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
# Trained on synthetic tissue: one fixed phrasing per target, and prompt groups.
BUNDLED = ("fixed", "group")
SEGMENTERS = {  # name -> the file here and the class in it, loaded when asked for
    "lite": "lite.LiteSegmenter",
    "sam3": "sam3.Sam3Segmenter",
    "clipseg": "clipseg.ClipSegSegmenter",
    "grounded-sam2": "grounded_sam2.GroundedSam2Segmenter",
    "sam2": "visual.Sam2Segmenter",
    "medsam": "visual.MedSamSegmenter",
    "seg-zero": "reasoning.SegZeroSegmenter",
    "vision-reasoner": "reasoning.VisionReasonerSegmenter",
}


def load_segmenter(name="lite", checkpoint=None, device=None, **options):
    """A segmenter ready to predict. checkpoint: a bundled one by name, a folder, or a hub repository.

    `options` are the keywords of the segmenter's own class, such as `truncate` of `models.sam3.Sam3Segmenter`.
    """
    import torch

    if name not in SEGMENTERS:
        raise ModelError(f"segmenter {name!r} is unknown; this version has: {', '.join(SEGMENTERS)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # of several processes each has its own GPU
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used here; choose cpu, or cuda where there is a GPU") from error
    file, kind = SEGMENTERS[name].split(".")
    segmenter = getattr(import_module(f".{file}", __name__), kind)
    has = inspect.getfullargspec(segmenter)
    known, defaults = has.kwonlyargs, has.kwonlydefaults or {}
    if unknown := [option for option in options if option not in known]:
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise ModelError(f"{name} has no option {unknown[0]!r}; {there}, so leave it out")
    for option, value in options.items():
        if option in defaults and isinstance(defaults[option], bool) != isinstance(value, bool):
            wanted = "true or false" if isinstance(defaults[option], bool) else "a number or a word"
            raise ModelError(f"{name}: {option} is {value!r}; give {wanted}")
        if isinstance(value, float) and not isinstance(defaults.get(option), float):
            raise ModelError(f"{name}: {option} is {value!r}; give a whole number, or a word where it takes one")
    if name == "lite":
        checkpoint = "group" if checkpoint is None else checkpoint
        checkpoint = CHECKPOINTS / f"lite-{checkpoint}" if checkpoint in BUNDLED else checkpoint
    return segmenter.from_pretrained(checkpoint, device, **options)
