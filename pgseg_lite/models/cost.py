"""What a training step of `sam3` costs on a card, computed and not measured: FLOPs, seconds, memory.

FLOPs are those of the published shape at 1008 px. An image passes the vision encoder once; a phrasing passes DETR
encoder, decoder and mask decoder. Text is embedded once before the first step and costs nothing here.
"""

from collections import namedtuple
from functools import cache

import torch

from . import finetune

IMAGE, PHRASING = 5.61, 0.44  # TFLOP forward: vision encoder with its neck, and everything behind it
# The backward pass in forward passes: gradients of activations and of weights are one each, and LoRA's own weights are
# so few that only the first counts. What is frozen, and has nothing trained before it, has none.
BACKWARD = {"decoder": (0, 2), "lora": (1, 1), "full": (2, 2)}  # of the image's part, of a phrasing's

Gpu = namedtuple("Gpu", "memory peak")  # GiB as PyTorch reports them; TFLOP/s in half precision, dense, data sheet
GPUS = {
    "T4": Gpu(14.7, 65),
    "L4": Gpu(22.2, 121),
    "A100 40 GB": Gpu(39.5, 312),
    "A100 80 GB": Gpu(79.1, 312),
    "H100 80 GB": Gpu(79.1, 989),
}
UTILISATION = 0.35  # share of the peak that training reaches: an assumption, between a fifth and a half in practice

Expected = namedtuple("Expected", "memory seconds fits serial")


def step_flops(trainable, phrasings, batch=1, checkpointing=False, serial=False):
    """TFLOP of one forward and backward pass. phrasings: of one image, all its targets together."""
    image, phrasing = BACKWARD[trainable]
    again = checkpointing and trainable != "decoder"  # the encoder's layers computed again for the backward pass
    return batch * (IMAGE * (1 + image + again) + phrasings * PHRASING * (1 + phrasing + serial))


def evaluation_flops(phrasings):
    """TFLOP to ask for `phrasings` masks of one image."""
    return IMAGE + phrasings * PHRASING


def expected(gpu, settings, phrasings):
    """GiB, seconds an optimiser step, whether that fits, and whether phrasings go one by one, on a card of GPUS."""
    card = GPUS[gpu]
    settings = finetune.choose_serial(full_size(), settings, phrasings, card.memory)
    memory = finetune.memory_needed(full_size(), settings, phrasings)
    flops = step_flops(settings.trainable, phrasings, settings.batch_size, settings.checkpointing, settings.serial)
    seconds = flops * settings.accumulation / (card.peak * UTILISATION)
    return Expected(memory, seconds, memory <= card.memory, settings.serial)


@cache
def full_size():
    """SAM3 without its text encoder, as it is trained: shapes alone, no numbers."""
    from .access import of_transformers

    config, model = of_transformers("Sam3Config", "Sam3Model")
    with torch.device("meta"):
        sam = model(config())
    sam.text_encoder = sam.text_projection = None
    return sam
