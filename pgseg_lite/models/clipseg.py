"""`clipseg`: a small decoder on a frozen CLIP (Lüddecke and Ecker, 2022), `transformers.CLIPSegForImageSegmentation`.

    image    -> CLIP's vision encoder -> activations of three of its layers, once per image
    phrasing -> CLIP's text encoder -> one vector [D], once per phrasing, ever
    a pair   -> decoder of a million parameters -> one map; the vector scales and shifts its features (FiLM)

The decoder alone is trained, as its authors did.
"""

import torch
import torch.nn.functional as F

from ..settings import BASELINE_PROFILES
from .access import (
    LIKE_IMAGENET,
    fetch,
    load_model,
    load_tokenizer,
    normalise,
    of_transformers,
    read_preprocessing,
    save_preprocessing,
    saving,
    to_square,
)  # fmt: skip
from .tiles import ImageFeatures, TiledSegmenter, check_tile, tile_boxes
from .towers import TextTower

HUB_NAME = "CIDAS/clipseg-rd64-refined"
# As its authors trained it: ImageNet's mean and standard deviation, not those of CLIP.
PREPROCESSING = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 352, "width": 352},
} | LIKE_IMAGENET


class ClipText(TextTower):
    """CLIP's text encoder, which reads 77 tokens, start and end included."""

    reader, dimensions = "CLIPSeg", 2

    def _embed(self, texts, device):
        """[N, D]: the vector that CLIP would compare with an image's."""
        encoder, projection = self.parts
        tokens = self.tokens(texts, device)
        output = encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return projection(output.pooler_output).float().cpu()


class ClipSegSegmenter(TiledSegmenter):
    """tile: images larger than this are cut and stitched, since all that CLIP sees is 352 pixels a side.

    truncate: cut phrasings of over 77 tokens, with a warning, in place of refusing them.

    A mask is where the probability is above 0.3, the threshold of this module and also the one at which CLIPSeg's
    authors report on PhraseCut. CLIPSeg has no presence head: its presence is the probability of the likeliest pixel,
    so a target is there if any pixel is.
    """

    name = "clipseg"
    default_settings = BASELINE_PROFILES["lite"]
    options = {}  # noqa: RUF012 (none of its own decides what is trained)

    def __init__(self, clipseg, tokenizer, preprocessing, *, tile=None, truncate=False):
        super().__init__()
        check_tile(tile)
        clip, limit = clipseg.clip, clipseg.config.text_config.max_position_embeddings
        self.text = ClipText(tokenizer, [clip.text_model, clip.text_projection], limit, truncate)
        clip.text_model = clip.text_projection = None
        self.clipseg, self.preprocessing, self.tile = clipseg, preprocessing, tile
        size = preprocessing["size"]
        self.input_size = size["height"] if isinstance(size, dict) else size  # 352

    @property
    def kept_outside(self):
        return [self.preprocessing]

    def forward(self, pixel_values, text_features):
        """pixel_values [B, 3, H, W] in -1..1, text_features [B, P, D] -> SegmentationOutput."""
        size = tuple(pixel_values.shape[-2:])
        activations = self.encode_view(pixel_values)
        views = [[[layer[i : i + 1] for layer in activations]] for i in range(len(pixel_values))]
        return self.decode(ImageFeatures(views, tile_boxes(*size), size), text_features)

    @torch.no_grad()  # CLIP is frozen
    def encode_view(self, pixel_values):
        """[B, 3, h, w] in -1..1 -> what the decoder reads: the activations [B, L, D] of some of CLIP's layers."""
        pixels = normalise(to_square(pixel_values, self.input_size), self.preprocessing)
        hidden = self.clipseg.clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [hidden[layer + 1] for layer in self.clipseg.config.extract_layers]  # the first is the embedding

    def ask(self, activations, text_features, size):
        """One view with K phrasings: mask logits [K, *size], presence logits [K]."""
        expanded = [layer.expand(len(text_features), -1, -1) for layer in activations]  # no copies
        logits = self.clipseg.decoder(expanded, text_features).logits.float()  # [K, h, w]
        logits = F.interpolate(logits[:, None], size, mode="bilinear")[:, 0]
        return logits, logits.flatten(1).amax(1)

    def prepare_training(self, settings, texts, phrasings):
        """Freeze all but the decoder, and return the optimiser's parameter groups."""
        from .finetune import train_only

        self.text.check_lengths(texts)
        return train_only(self, settings, lambda name: name.startswith("clipseg.decoder."))

    @property
    def device(self):
        return self.clipseg.decoder.film_mul.weight.device

    def save_pretrained(self, folder):
        """A whole transformers checkpoint, tokenizer and all; config.json last."""
        clip = self.clipseg.clip
        with saving(folder) as partial:
            clip.text_model, clip.text_projection = self.text.parts
            self.clipseg.save_pretrained(partial)
            clip.text_model = clip.text_projection = None
            self.text.tokenizer.save_pretrained(partial)
            save_preprocessing(partial, self.preprocessing)

    @classmethod
    def from_pretrained(cls, checkpoint=None, device="cpu", **options):
        """From the hub by name, from a folder of transformers' `save_pretrained`, or one that training wrote."""
        model_class, tokenizer_class = of_transformers("CLIPSegForImageSegmentation", "CLIPTokenizerFast")
        folder = fetch(HUB_NAME if checkpoint is None else checkpoint, ("clipseg",))
        preprocessing = read_preprocessing(folder, PREPROCESSING)
        clipseg = load_model(model_class, folder)
        tokenizer = load_tokenizer(tokenizer_class, folder, clipseg.config.text_config.vocab_size, "CLIPSeg")
        return cls(clipseg, tokenizer, preprocessing, **options).to(device).eval()
