"""`lite`: a small convolutional encoder-decoder whose pixels are matched against sentences.

    image    -> U-Net -> pixel embeddings [B, D, H, W] and one image embedding [B, D]
    phrasing -> frozen sentence encoder -> two query vectors [K, D], one for pixels, one for presence
    mask logit = pixel . query        presence logit = image . query

The image passes the network once, however many phrasings ask about it. That is what SAM3 does too,
with 840 million parameters; this one trains from scratch in minutes.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import ModelError
from ..files import whole, write_text
from .access import fetch, read_json
from .base import SegmentationOutput, as_batch, check_prompts
from .text import TextEncoder, load_text_encoder

MODEL_TYPE = "pgseg-lite"


@dataclass
class LiteConfig:
    widths: list = field(default_factory=lambda: [48, 96, 128, 160])  # channels at 1/2, 1/4, 1/8, ... of the image
    dim: int = 32  # of pixel embeddings and queries
    text_hidden: int = 128
    text_dropout: float = 0.1  # on the sentence vector: keeps queries from memorising wordings


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut. Group norm: no running statistics, so no batch effects."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ImageEncoder(nn.Module):
    """U-Net on 2x2 pixel blocks. Returns pixel embeddings at full size and one vector for the image."""

    def __init__(self, config):
        super().__init__()
        widths = config.widths
        self.stem = nn.Conv2d(3 * 4, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Block(widths[max(i - 1, 0)], width) for i, width in enumerate(widths))
        self.up = nn.ModuleList(Block(a + b, a) for a, b in pairwise(widths))
        self.to_pixels = nn.Conv2d(widths[0], config.dim * 4, 1)
        self.to_image = nn.Sequential(nn.LayerNorm(2 * widths[-1]), nn.Linear(2 * widths[-1], config.dim))

    def forward(self, pixel_values):  # [B, 3, H, W], H and W multiples of `stride`
        x = self.stem(F.pixel_unshuffle(pixel_values, 2))
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        pooled = torch.cat([x.mean((-2, -1)), x.amax((-2, -1))], dim=-1)
        for block, skip in zip(reversed(self.up), reversed(skips[:-1]), strict=True):
            x = block(torch.cat([skip, F.interpolate(x, scale_factor=2)], dim=1))
        return F.pixel_shuffle(self.to_pixels(x), 2), self.to_image(pooled)  # [B, D, H, W], [B, D]


class QueryHead(nn.Module):
    """A sentence vector becomes a query for pixels, a query for presence, and a bias for each."""

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.text_dropout)
        self.hidden = nn.Linear(TextEncoder.dim, config.text_hidden)
        self.queries = nn.Linear(config.text_hidden, 2 * (config.dim + 1))

    def forward(self, text_features):  # [..., 384]
        # Unit vectors have entries of about 1/20; scaled up, the first layer sees unit variance.
        x = self.dropout(text_features * TextEncoder.dim**0.5)
        return self.queries(F.gelu(self.hidden(x))).chunk(2, dim=-1)  # 2 x [..., D + 1]


def match(queries, features):
    """queries [B, K, D + 1] against features [B, D, ...] -> [B, K, ...]; the last entry is the bias.

    Over sqrt(D), as in attention: without it logits grow so fast that the consistency term, a square, diverges.
    """
    weight, bias = queries[..., :-1] * features.shape[1] ** -0.5, queries[..., -1:]
    logits = torch.matmul(weight, features.flatten(2)) + bias
    return logits.reshape(*weight.shape[:2], *features.shape[2:])


class LiteSegmenter(nn.Module):
    name = "lite"

    def __init__(self, config=None):
        super().__init__()
        self.config = config or LiteConfig()
        self.stride = 2 ** len(self.config.widths)
        self.image_encoder = ImageEncoder(self.config)
        self.query_head = QueryHead(self.config)

    def forward(self, pixel_values, text_features):
        """pixel_values [B, 3, H, W] in -1..1, text_features [B, K, 384] -> SegmentationOutput."""
        return self.decode(self.image_encoder(pixel_values), text_features)

    def encode_image(self, images):
        """uint8 images -> (pixel embeddings [B, D, H, W], image embeddings [B, D])."""
        pixels = torch.from_numpy(as_batch(images)).to(self.device).permute(0, 3, 1, 2)  # [B, 3, H, W]
        height, width = pixels.shape[-2:]
        pixels = F.pad(to_pixel_values(pixels), (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        with torch.no_grad():
            embeddings, image = self.image_encoder(pixels.contiguous(memory_format=torch.channels_last))
        return embeddings[..., :height, :width], image

    def encode_text(self, prompts):
        """Phrasings -> their sentence vectors [K, 384], embedded once, ever."""
        prompts, encoder = check_prompts(prompts), load_text_encoder()
        encoder.refuse_long(prompts)
        return encoder.encode(prompts).to(self.device)

    def decode(self, image_features, text_features):
        """Every image with every phrasing. text_features [K, 384], or [B, K, 384] when images differ."""
        pixels, image = image_features
        if text_features.ndim == 2:
            text_features = text_features.expand(len(pixels), -1, -1)
        for_pixels, for_presence = self.query_head(text_features)
        presence = match(for_presence, image[..., None])[..., 0]  # [B, K]
        return SegmentationOutput(match(for_pixels, pixels).float(), presence.float())

    @torch.inference_mode()
    def predict(self, image, prompts):
        """Masks for one image [H, W, 3] or several, for every phrasing. Switches dropout off."""
        self.eval()
        return self.decode(self.encode_image(image), self.encode_text(prompts))

    @property
    def device(self):
        return self.query_head.hidden.weight.device

    def save_pretrained(self, folder, dtype=torch.float32):
        """model.safetensors, then config.json, as the hub expects them; float16 halves the file."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        with whole(folder / "model.safetensors") as partial:
            save_file(state, partial, metadata={"format": "pt"})
        config = {"model_type": MODEL_TYPE, "text_encoder": TextEncoder.name, **asdict(self.config)}
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, checkpoint, device="cpu"):
        """From a folder that `save_pretrained` wrote, or the name of such a repository on the hub."""
        folder = fetch(checkpoint, (MODEL_TYPE,))
        model = cls(read_config(folder / "config.json"))
        model.load_state_dict(read_weights(folder / "model.safetensors", model.state_dict()))
        return model.to(device).eval()


def to_pixel_values(images):
    """uint8 0..255 -> float -1..1."""
    return images.float() / 127.5 - 1


def read_config(path):
    stored, known = read_json(path), [field.name for field in fields(LiteConfig)]
    for name in known:
        if name not in stored:
            raise ModelError(f"{path}: the field {name} is missing; restore the file")
    return LiteConfig(**{name: stored[name] for name in known})


def read_weights(path, expected):
    """The tensors of a checkpoint as float32, each of the shape that `expected`, a state dict, has."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError(f"{path}: no such file; copy the checkpoint again")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged weights ({error}); copy the checkpoint again") from error
    for name, tensor in expected.items():
        if name not in state:
            raise ModelError(f"{path}: the tensor {name} is missing; this is not a checkpoint of this model")
        if state[name].shape != tensor.shape:
            found, asked = list(state[name].shape), list(tensor.shape)
            raise ModelError(f"{path}: {name} has shape {found}, config.json asks for {asked}")
        if not torch.isfinite(state[name]).all():
            raise ModelError(f"{path}: {name} holds NaN or infinity; the training that wrote it had failed")
    return {name: state[name].float() for name in expected}
