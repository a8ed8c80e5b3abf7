"""Grounding DINO as a tool, frozen: boxes for a phrasing, its image and text encoders asked once."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .access import (
    LIKE_IMAGENET,
    fetch,
    load_model,
    load_tokenizer,
    normalise,
    of_transformers,
    read_preprocessing,
    save_preprocessing,
)
from .towers import TextTower

HUB_NAME = "IDEA-Research/grounding-dino-tiny"
PREPROCESSING = {
    "image_processor_type": "GroundingDinoImageProcessor",
    "size": {"shortest_edge": 800, "longest_edge": 1333},
} | LIKE_IMAGENET
AT_ONCE = 4  # phrasings in the detector together: each takes some hundred MB at the published size
SMALLEST = 64  # pixels: the coarsest features of the detector are at 1/64


class DinoText(TextTower):
    """BERT as Grounding DINO uses it: 256 tokens, in which the words between two full stops see only each other."""

    reader = "Grounding DINO"
    ending = 2  # the full stop, and the end token

    def __init__(self, *args, special_tokens):
        super().__init__(*args)
        self.special_tokens = special_tokens  # {} in versions of transformers that have them fixed

    def prepare(self, text):
        """In lower case and with a full stop at the end, as the detector was trained; it misses much otherwise."""
        return text.lower().strip(" \n\t").rstrip(". ") + "."

    def _embed(self, texts, device):
        """[L, D + 1] for each: token features, and the token's number as the last channel, 0 for padding."""
        from transformers.models.grounding_dino.modeling_grounding_dino import (
            generate_masks_with_special_tokens_and_transfer_map as masks_and_positions,
        )

        encoder, projection = self.parts
        lost = self.what_is_lost(texts)
        kept = [self.prepare(self.prepare(text).removesuffix(lost.get(text, ""))) for text in texts]
        tokens = self.tokens(kept, device, padding=True)
        ids = tokens["input_ids"]  # [N, L]
        masks, positions = masks_and_positions(ids, **{k: v.to(device) for k, v in self.special_tokens.items()})
        features = projection(encoder(ids, masks[:, None], torch.zeros_like(ids), positions).last_hidden_state)
        features = torch.cat([features, ids[..., None]], dim=-1).float().cpu()
        return [each[:length] for each, length in zip(features, tokens["attention_mask"].sum(1), strict=True)]


class Given(nn.Module):
    """Stands where an encoder stood, and gives the answer that the encoder gave before."""

    def forward(self, *_, **__):
        return self.answer


class Detector:
    """Grounding DINO, frozen. Not a module, so that no checkpoint of a run has to hold it."""

    def __init__(self, dino, tokenizer, preprocessing):
        inner = dino.eval().requires_grad_(False).model
        self.dino, self.preprocessing = dino, preprocessing
        special = {"special_tokens": inner.special_tokens} if hasattr(inner, "special_tokens") else {}
        text = [inner.text_backbone, inner.text_projection]
        self.text = DinoText(tokenizer, text, dino.config.max_text_len, False, special_tokens=special)
        self.backbone = inner.backbone
        self.take_out()

    def take_out(self):
        """Leave stand-ins where the encoders are, which would run for every pair of an image and a phrasing."""
        inner = self.dino.model
        inner.backbone, inner.text_backbone, inner.text_projection = Given(), Given(), nn.Identity()
        inner.backbone.position_embedding = self.backbone.position_embedding

    def put_back(self):
        inner = self.dino.model
        inner.backbone, (inner.text_backbone, inner.text_projection) = self.backbone, self.text.parts

    @property
    def parts(self):
        """All that decides which boxes are found."""
        return [self.dino, self.backbone, *self.text.parts, self.preprocessing]

    def move(self, *args, **kwargs):
        """To another device, as `nn.Module.to` does with what belongs to a module."""
        for module in (self.dino, self.backbone):
            module._apply(*args, **kwargs)

    @torch.no_grad()
    def encode(self, pixel_values):
        """[1, 3, h, w] in -1..1 -> the backbone's features, and the size that they belong to."""
        size = PREPROCESSING["size"] | self.preprocessing["size"]
        sides = pixel_values.shape[-2:]
        scale = min(size["shortest_edge"] / min(sides), size["longest_edge"] / max(sides))
        sides = [max(SMALLEST, round(side * scale)) for side in sides]
        pixels = F.interpolate(pixel_values, sides, mode="bilinear", antialias=True)
        with torch.autocast(pixels.device.type, enabled=False):  # boxes in training as in prediction
            pixels = normalise(pixels.float(), self.preprocessing)
            return self.backbone(pixels, torch.ones_like(pixels[:, 0], dtype=torch.long)), sides

    @torch.no_grad()
    def find(self, view, text_features, size, threshold):
        """Boxes of each of K phrasings, [n, 4] as x0, y0, x1, y1 in pixels of `size`, and the highest logit [K]."""
        boxes, highest = [], []
        for portion in text_features.split(AT_ONCE):
            output = self.ask(view, portion)
            scores = output.logits.amax(-1)  # [k, Q], the best word of each box
            centre, extent = output.pred_boxes.chunk(2, dim=-1)  # [k, Q, 2], shares of width and height
            corners = torch.cat([centre - extent / 2, centre + extent / 2], dim=-1)
            corners = corners * corners.new_tensor([size[1], size[0]]).repeat(2)
            boxes += [of_one[score.sigmoid() > threshold] for of_one, score in zip(corners, scores, strict=True)]
            highest.append(scores.amax(1))
        return boxes, torch.cat(highest)

    def ask(self, view, text_features):
        """Grounding DINO's own answer for one image and k phrasings [k, L, D + 1]."""
        from transformers.modeling_outputs import BaseModelOutput

        features, ids = text_features[..., :-1], text_features[..., -1].long()  # [k, L, D], [k, L]
        length = int((ids > 0).sum(1).max())
        features, ids = features[:, :length], ids[:, :length]
        answer, sides = view
        inner, k = self.dino.model, len(ids)
        inner.backbone.answer = for_each(answer, k)
        inner.text_backbone.answer = BaseModelOutput(last_hidden_state=features)
        pixels = features.new_zeros(1).expand(k, 3, *sides)  # read for their size only
        with torch.autocast(features.device.type, enabled=False):
            return self.dino(pixel_values=pixels, input_ids=ids, attention_mask=(ids > 0).long())

    def save_pretrained(self, folder):
        self.put_back()
        self.dino.save_pretrained(folder)
        self.take_out()
        self.text.tokenizer.save_pretrained(folder)
        save_preprocessing(folder, self.preprocessing)

    @classmethod
    def from_pretrained(cls, checkpoint=None):
        """From the hub by name, or from a folder of transformers' `save_pretrained`."""
        dino_class, tokenizer_class = of_transformers("GroundingDinoForObjectDetection", "BertTokenizerFast")
        folder = fetch(HUB_NAME if checkpoint is None else checkpoint, ("grounding-dino",))
        preprocessing = read_preprocessing(folder, PREPROCESSING)
        dino = load_model(dino_class, folder)
        tokenizer = load_tokenizer(tokenizer_class, folder, dino.config.text_config.vocab_size, "Grounding DINO")
        return cls(dino, tokenizer, preprocessing)


def for_each(answer, k):
    """One image's features, lists and tuples of [1, ...], for k phrasings: views of the same memory, not copies."""
    if isinstance(answer, torch.Tensor):
        return answer.expand(k, *answer.shape[1:])
    return type(answer)(for_each(part, k) for part in answer)
