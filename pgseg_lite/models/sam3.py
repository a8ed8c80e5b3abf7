"""`sam3`: the paper's model, `transformers.Sam3Model`, asked with many phrasings about one image.

    image    -> vision encoder -> feature pyramid, once per image (89 % of the work for one phrasing)
    phrasing -> frozen text encoder -> token features [L, D], once per phrasing, ever
    a pair   -> DETR encoder, decoder, mask decoder -> 200 query masks -> one map by `aggregate`

What may be trained, and how fast, is decided in finetune.py.
"""

import json

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import SettingsError
from ..settings import Sam3Settings
from .access import OPTIONS_FILE, fetch, load_model, load_tokenizer, of_transformers, read_json, saving, to_square
from .base import AGGREGATIONS, aggregate
from .tiles import ImageFeatures, TiledSegmenter, check_tile, tile_boxes
from .towers import TextTower

HUB_NAME = "facebook/sam3"
MODEL_TYPES = ("sam3", "sam3_video")  # the published file holds the video model; its detector is Sam3Model
AT_ONCE = 8  # phrasings decoded together when nothing is trained: bounds memory, changes nothing


class Sam3Text(TextTower):
    """CLIP's encoder of 354 million parameters, which reads 32 tokens, start and end included."""

    reader = "SAM3"

    def _embed(self, texts, device):
        """[N, L, D + 1]: token features, and a last channel that is 1 for a token and 0 for padding."""
        encoder, projection = self.parts
        tokens = self.tokens(texts, device)
        mask = tokens["attention_mask"]  # [N, L]; without it, padding changes the masks
        features = projection(encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state)
        return torch.cat([features, mask[..., None]], dim=-1).float().cpu()


class Sam3Segmenter(TiledSegmenter):
    """reading, top_k: see `aggregate`. presence_gate: multiply a map by the probability of presence, as SAM3 does.

    tile: images larger than this are cut and stitched, since 200 queries are too few for a crowded large one.
    serial: one phrasing at a time, in training too, so that K phrasings need the memory of one.
    truncate: cut phrasings of over 32 tokens, with a warning, in place of refusing them.
    """

    name = "sam3"
    default_settings = Sam3Settings()

    def __init__(
        self, sam, tokenizer, *, reading="max-score", top_k=None, presence_gate=True, tile=None, serial=False,
        truncate=False,
    ):  # fmt: skip
        super().__init__()
        if reading not in AGGREGATIONS:
            raise SettingsError(f"aggregation {reading!r} is unknown; choose one of {', '.join(AGGREGATIONS)}")
        queries = sam.config.detr_decoder_config.num_queries
        if top_k is not None and not 1 <= top_k <= queries:
            raise SettingsError(f"top_k is {top_k}; it must be 1 to {queries}, the number of queries")
        check_tile(tile)
        limit = sam.text_encoder.config.max_position_embeddings
        self.text = Sam3Text(tokenizer, [sam.text_encoder, sam.text_projection], limit, truncate)
        sam.text_encoder = sam.text_projection = None
        for module in sam.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # K equal phrasings would differ by as much as different ones, and drown L_cons
        self.sam = sam
        self.options = {"reading": reading, "top_k": top_k, "presence_gate": presence_gate}
        self.tile, self.serial = tile, serial
        self.input_size = sam.config.vision_config.backbone_config.image_size  # 1008

    def forward(self, pixel_values, text_features):
        """pixel_values [B, 3, H, W] in -1..1, text_features [B, P, L, D + 1] -> SegmentationOutput."""
        size = tuple(pixel_values.shape[-2:])
        vision = self.encode_view(pixel_values)
        views = [[one_image(vision, i)] for i in range(len(pixel_values))]
        return self.decode(ImageFeatures(views, tile_boxes(*size), size), text_features)

    def encode_view(self, pixel_values):
        return self.sam.vision_encoder(to_square(pixel_values, self.input_size))

    def ask(self, view, text_features, size):
        """One view with K phrasings, all at once, in portions, or one by one: mask logits [K, *size], presence [K]."""
        training = torch.is_grad_enabled()
        portions = text_features.split(1 if self.serial else len(text_features) if training else AT_ONCE)
        if self.serial and training:
            # Every term needs all K maps, but a map is small: keep it and drop the graph behind it. Each phrasing's is
            # built again when its turn to go backward comes, so one is alive at a time and the gradients are the same.
            answers = [recompute(self.read, view, portion, size, use_reentrant=False) for portion in portions]
        else:
            answers = [self.read(view, portion, size) for portion in portions]
        masks, presence = zip(*answers, strict=True)
        return torch.cat(masks), torch.cat(presence)

    def read(self, view, text_features, size):
        """One pass of SAM3's decoders: text_features [K, L, D + 1] -> mask logits [K, *size], presence logits [K]."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features, tokens = text_features[..., :-1], text_features[..., -1] > 0.5  # [K, L, D], [K, L]
        output = self.sam(
            vision_embeds=for_each(view, len(features)),
            text_embeds=BaseModelOutputWithPooling(pooler_output=features),
            attention_mask=tokens,
        )
        presence = output.presence_logits[:, 0].float()  # [K]
        logits = aggregate(
            output.pred_masks.float(),  # [K, Q, h, w]
            output.pred_logits.float(),  # [K, Q]
            presence if self.options["presence_gate"] else None,
            reading=self.options["reading"],
            top_k=self.options["top_k"],
            semantic_logits=output.semantic_seg[:, 0].float(),
        )  # [K, h, w]
        return F.interpolate(logits[:, None], size, mode="bilinear")[:, 0], presence

    def prepare_training(self, settings, texts, phrasings):
        """Check what can be checked, choose what is trained, and return the optimiser's parameter groups."""
        from . import finetune

        self.text.check_lengths(texts)
        settings = finetune.check(self, settings, phrasings)
        finetune.choose_parts(self, settings)
        self.serial = settings.serial
        return finetune.parameter_groups(self.sam, settings)

    @property
    def device(self):
        return self.sam.detr_decoder.query_embed.weight.device

    def save_pretrained(self, folder):
        """A whole transformers checkpoint, tokenizer and all, with LoRA folded in; config.json last."""
        from .finetune import fold_lora

        fold_lora(self.sam)
        with saving(folder) as partial:
            self.sam.text_encoder, self.sam.text_projection = self.text.parts
            self.sam.save_pretrained(partial)
            self.sam.text_encoder = self.sam.text_projection = None
            self.text.tokenizer.save_pretrained(partial)
            (partial / OPTIONS_FILE).write_text(json.dumps(self.options, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, checkpoint=None, device="cpu", **options):
        """From the hub by name, from a folder of transformers' `save_pretrained`, or one that training wrote."""
        model_class, tokenizer_class = of_transformers("Sam3Model", "CLIPTokenizerFast")
        folder = fetch(HUB_NAME if checkpoint is None else checkpoint, MODEL_TYPES)
        options = read_json(folder / OPTIONS_FILE) | options
        sam = load_model(model_class, folder)
        tokenizer = load_tokenizer(tokenizer_class, folder, sam.config.text_config.vocab_size, "SAM3")
        return cls(sam, tokenizer, **options).to(device).eval()


def one_image(vision, i):
    """The features of image i out of a batch's."""
    return like(vision, lambda tensor: tensor[i : i + 1])


def for_each(vision, k):
    """One image's features for k phrasings: views of the same memory, not copies."""
    return like(vision, lambda tensor: tensor.expand(k, -1, -1, -1))


def like(vision, change):
    levels, positions = vision.fpn_hidden_states, vision.fpn_position_encoding  # tuples of [B, C, h, w]
    return type(vision)(
        fpn_hidden_states=tuple(map(change, levels)), fpn_position_encoding=tuple(map(change, positions))
    )
