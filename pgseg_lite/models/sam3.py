"""`sam3`: the paper's model, `transformers.Sam3Model`, asked with many phrasings about one image.

    image    -> vision encoder -> feature pyramid, once per image (89 % of the work for one phrasing)
    phrasing -> frozen text encoder -> token features [L, D], once per phrasing, ever
    a pair   -> DETR encoder, decoder, mask decoder -> 200 query masks -> one map by `aggregate`

What may be trained, and how fast, is decided in finetune.py.
"""

import json
import warnings
from collections import namedtuple
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import ModelError, SettingsError
from ..settings import Sam3Settings
from .access import fetch, load_model, load_part, of_transformers
from .base import AGGREGATIONS, SegmentationOutput, aggregate, as_batch, check_prompts
from .lite import to_pixel_values
from .tiles import stitch, tile_boxes

HUB_NAME = "facebook/sam3"
MODEL_TYPES = ("sam3", "sam3_video")  # the published file holds the video model; its detector is Sam3Model
OPTIONS_FILE = "pgseg.json"  # how query masks become one map: a checkpoint is read as it was trained
AT_ONCE = 8  # phrasings decoded together when nothing is trained: bounds memory, changes nothing

# Per image of the batch its views (the image, or its tiles), where they lie, and the image's size.
ImageFeatures = namedtuple("ImageFeatures", "views boxes size")


class TextTower:
    """Tokenizer and frozen text encoder. Not a module: neither checkpoints nor the GPU should hold its 354 million."""

    def __init__(self, tokenizer, encoder, projection, truncate):
        self.tokenizer, self.truncate = tokenizer, truncate
        self.encoder, self.projection = (part.eval().requires_grad_(False) for part in (encoder, projection))
        self.limit = encoder.config.max_position_embeddings  # 32 tokens, start and end included
        self._features = {}  # phrasing -> [L, D + 1]
        self._warned = set()

    def encode(self, texts, device):
        """[N, L, D + 1]: token features, and a last channel that is 1 for a token and 0 for padding."""
        self.check_lengths(texts)
        if new := [text for text in dict.fromkeys(texts) if text not in self._features]:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # weights moved in inference mode would stay marked by it
                parts = (self.encoder.to(device), self.projection.to(device))
                for start in range(0, len(new), 64):
                    batch = new[start : start + 64]
                    self._features.update(zip(batch, self._embed(batch, *parts, device), strict=True))
                for part in parts:  # 1.4 GB that images can use better; moving takes a fraction of a second
                    part.to("cpu")
        return torch.stack([self._features[text] for text in texts]).to(device)

    def _embed(self, texts, encoder, projection, device):
        options = dict(padding="max_length", max_length=self.limit, truncation=True, return_tensors="pt")
        tokens = self.tokenizer(texts, **options).to(device)
        mask = tokens["attention_mask"]  # [N, L]; without it, padding changes the masks
        features = projection(encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state)
        return torch.cat([features, mask[..., None]], dim=-1).float().cpu()  # [N, L, D + 1]

    def check_lengths(self, texts):
        """Refuse phrasings that are too long, or warn of each and what it loses when `truncate` was asked for."""
        lost = self.what_is_lost(texts)
        if not lost:
            return
        listed = [f"{text!r} loses {words!r}" for text, words in lost.items()]
        said = f"SAM3 reads {self.limit} tokens, too few for {len(lost)} of {len(texts)} phrasings"
        if not self.truncate:
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            some = "; ".join(listed[:3]) + more
            raise ModelError(f"{said}: {some}; shorten them, or cut them with truncate=True (--option truncate=true)")
        if not lost.keys() <= self._warned:
            warnings.warn(f"{said}, and they are cut:\n" + "\n".join(listed), stacklevel=3)
            self._warned |= lost.keys()

    def what_is_lost(self, texts):
        """Over-long phrasing -> its words that the encoder would never see."""
        encoded = self.tokenizer(list(texts), truncation=False, return_offsets_mapping=True, verbose=False)
        offsets = zip(texts, encoded["offset_mapping"], strict=True)
        # The end token takes the last of the places.
        return {text: text[spans[self.limit - 1][0] :] for text, spans in offsets if len(spans) > self.limit}


class Sam3Segmenter(nn.Module):
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
        if tile is not None and tile < 32:
            raise SettingsError(f"tile is {tile}; a tile must have at least 32 pixels a side")
        self.text = TextTower(tokenizer, sam.text_encoder, sam.text_projection, truncate)
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
        vision = self.sam.vision_encoder(self.resize(pixel_values))
        views = [[one_image(vision, i)] for i in range(len(pixel_values))]
        return self.decode(ImageFeatures(views, tile_boxes(*size), size), text_features)

    @torch.no_grad()
    def encode_image(self, images):
        """uint8 images -> their features; a large one tile by tile when `tile` is set."""
        pixels = torch.from_numpy(as_batch(images)).permute(0, 3, 1, 2)  # [B, 3, H, W]
        size = tuple(pixels.shape[-2:])
        boxes = tile_boxes(*size, self.tile)
        views = [[self.encode_view(image[:, y0:y1, x0:x1]) for y0, x0, y1, x1 in boxes] for image in pixels]
        return ImageFeatures(views, boxes, size)

    def encode_view(self, pixels):  # uint8 [3, h, w]
        return self.sam.vision_encoder(self.resize(to_pixel_values(pixels[None].to(self.device))))

    def resize(self, pixel_values):
        """To the one size that SAM3 takes; it was trained on squares, whatever the image's shape."""
        side = (self.input_size, self.input_size)
        if pixel_values.shape[-2:] == side:
            return pixel_values
        return F.interpolate(pixel_values, side, mode="bilinear", antialias=True)

    def encode_text(self, prompts):
        """Phrasings -> token features and their mask [K, L, D + 1], embedded once."""
        return self.text.encode(check_prompts(prompts), self.device)

    def decode(self, image_features, text_features):
        """Every image with every phrasing. text_features [K, L, D + 1], or [B, K, L, D + 1] when images differ."""
        views, boxes, size = image_features
        if text_features.ndim == 3:
            text_features = text_features.expand(len(views), -1, -1, -1)
        masks, presence = [], []
        for tiles, text in zip(views, text_features, strict=True):
            sizes = [(bottom - top, right - left) for top, left, bottom, right in boxes]
            asked = [self.ask(view, text, side) for view, side in zip(tiles, sizes, strict=True)]
            masks.append(stitch([logits for logits, _ in asked], boxes, size))  # [K, H, W]
            presence.append(torch.stack([there for _, there in asked]).amax(0))  # [K], in any tile
        return SegmentationOutput(torch.stack(masks), torch.stack(presence))

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

    @torch.inference_mode()
    def predict(self, image, prompts):
        """Masks for one image [H, W, 3] or several, for every phrasing."""
        self.eval()
        text_features = self.encode_text(prompts)  # first: a phrasing that is too long is refused at once
        return self.decode(self.encode_image(image), text_features)

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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix="saving-") as partial:
            self.sam.text_encoder, self.sam.text_projection = self.text.encoder, self.text.projection
            self.sam.save_pretrained(partial)
            self.sam.text_encoder = self.sam.text_projection = None
            self.text.tokenizer.save_pretrained(partial)
            (Path(partial) / OPTIONS_FILE).write_text(json.dumps(self.options, indent=2) + "\n")
            for file in sorted(Path(partial).iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(folder / file.name)

    @classmethod
    def from_pretrained(cls, checkpoint=None, device="cpu", **options):
        """From the hub by name, from a folder of transformers' `save_pretrained`, or one that training wrote."""
        model_class, tokenizer_class = of_transformers("Sam3Model", "CLIPTokenizerFast")
        folder = fetch(HUB_NAME if checkpoint is None else checkpoint, MODEL_TYPES)
        stored = folder / OPTIONS_FILE
        options = (json.loads(stored.read_text()) if stored.is_file() else {}) | options
        tokenizer = load_part(tokenizer_class, folder)
        sam = load_model(model_class, folder)
        if len(tokenizer) < sam.config.text_config.vocab_size:  # it would read every word as unknown
            said = f"the tokenizer has {len(tokenizer)} entries, too few for SAM3"
            raise ModelError(f"{folder}: {said}; fetch its files again")
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
