"""Text-prompted segmenters: one small protocol, one loader."""

from pathlib import Path

from ..errors import ModelError
from .base import AGGREGATIONS, SegmentationOutput, Segmenter, aggregate

__all__ = ["AGGREGATIONS", "BUNDLED", "SegmentationOutput", "Segmenter", "aggregate", "load_segmenter"]

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
# Trained on synthetic tissue: one fixed phrasing per target, and prompt groups.
BUNDLED = ("fixed", "group")
SEGMENTERS = ("lite", "sam3")


def load_segmenter(name="lite", checkpoint=None, device=None, **options):
    """A segmenter ready to predict. checkpoint: a bundled one by name, a folder, or a hub repository.

    `options` are the segmenter's own: see `models.sam3.Sam3Segmenter`; `lite` has none.
    """
    import torch

    if name not in SEGMENTERS:
        raise ModelError(f"segmenter {name!r} is unknown; this version has: {', '.join(SEGMENTERS)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used here; choose cpu, or cuda where there is a GPU") from error
    if name == "sam3":
        from .sam3 import Sam3Segmenter

        return Sam3Segmenter.from_pretrained(checkpoint, device, **options)
    from .lite import LiteSegmenter

    if options:
        raise ModelError(f"lite has no option {next(iter(options))!r}; leave it out")
    checkpoint = "group" if checkpoint is None else checkpoint
    folder = CHECKPOINTS / f"lite-{checkpoint}" if checkpoint in BUNDLED else checkpoint
    return LiteSegmenter.from_pretrained(folder, device)
