"""Saliency from a CLIP and short answers from a VQA model: prompt sources with published weights.

    Fused(answers=True, box=True, saliency=ClipSaliency.from_pretrained(...), answer=VqaAnswers.from_pretrained(...))

BiomedCLIP and MedVInT, which the paper uses, are published as pickles, and pickles are not loaded here. BiomedCLIP is
read from its tensors in a .safetensors file under open_clip's names; for MedVInT stands any BLIP for questions.
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import ModelError
from ..models.access import LIKE_CLIP, fetch, load_model, load_tokenizer, normalise, of_transformers, read_json
from ..models.lite import read_weights, to_pixel_values

CLIP, BIOMED_CLIP = "openai/clip-vit-base-patch32", "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
VQA = "Salesforce/blip-vqa-base"
OPEN_CLIP = "open_clip_config.json"
CHANNELS = 32  # of the tokens, tried one by one as masks
HEAD = 64  # entries of an attention head, in both towers of BiomedCLIP
QUESTIONS = ("What shape are the cell nuclei?", "How many cell nuclei are there?", "Where are the cell nuclei?")


class ClipTowers(nn.Module):
    """A CLIP of transformers as the saliency needs it."""

    def __init__(self, clip):
        super().__init__()
        self.clip, self.side, self.limit = clip, clip.config.vision_config.image_size, 77

    def tokens(self, pixels):
        """[B, 3, side, side] -> what enters the last layer, [B, 1 + n, D]."""
        return self.clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]

    def image(self, tokens):
        """The image's vector from what enters the last layer: [B, 1 + n, D] -> [B, E]."""
        vision = self.clip.vision_model
        last = vision.encoder.layers[-1](tokens, attention_mask=None)
        last = last[0] if isinstance(last, tuple) else last
        return self.clip.visual_projection(vision.post_layernorm(last[:, 0]))

    def text(self, asked):
        return self.clip.text_projection(self.clip.text_model(**asked).pooler_output)


class BiomedClipTowers(nn.Module):
    """BiomedCLIP from its tensors: a ViT, a BERT, and a projection of each to one space; sizes are read off."""

    def __init__(self, weights):
        super().__init__()
        from transformers import BertConfig, BertModel

        width, _, patch, _ = weights["visual.trunk.patch_embed.proj.weight"].shape
        patches = weights["visual.trunk.pos_embed"].shape[1] - 1
        depth = len([name for name in weights if re.fullmatch(r"visual\.trunk\.blocks\.\d+\.norm1\.weight", name)])
        layers = len([name for name in weights if name.endswith(".attention.self.query.weight")])
        self.side, self.limit = round(patches**0.5) * patch, 256
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.start, self.place = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.zeros(1, patches + 1, width)),
        )
        inner = weights["visual.trunk.blocks.0.mlp.fc1.weight"].shape[0]
        how = dict(dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // HEAD, inner, **how) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.project = nn.Linear(width, weights["visual.head.proj.weight"].shape[0], bias=False)
        words = weights["text.transformer.embeddings.word_embeddings.weight"]
        config = BertConfig(
            vocab_size=len(words), hidden_size=words.shape[1], num_hidden_layers=layers,
            num_attention_heads=words.shape[1] // HEAD,
            intermediate_size=weights["text.transformer.encoder.layer.0.intermediate.dense.weight"].shape[0],
            max_position_embeddings=len(weights["text.transformer.embeddings.position_embeddings.weight"]),
        )  # fmt: skip
        self.bert, (hidden, wide) = BertModel(config, add_pooling_layer=False), weights["text.proj.0.weight"].shape
        out = weights["text.proj.2.weight"].shape[0]
        self.speak = nn.Sequential(nn.Linear(wide, hidden, bias=False), nn.GELU(), nn.Linear(hidden, out, bias=False))

    def tokens(self, pixels):
        patches = self.patch(pixels).flatten(2).transpose(1, 2)  # [B, n, D]
        x = torch.cat([self.start.expand(len(patches), -1, -1), patches], dim=1) + self.place
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def image(self, tokens):
        return self.project(self.norm(self.blocks[-1](tokens))[:, 0])

    def text(self, asked):
        return self.speak(self.bert(**asked).last_hidden_state[:, 0])

    @staticmethod
    def names(name):
        """Our name of a tensor -> open_clip's."""
        for ours, theirs in (
            ("bert.", "text.transformer."), ("speak.", "text.proj."), ("project.", "visual.head.proj."),
            ("patch.", "visual.trunk.patch_embed.proj."), ("start", "visual.trunk.cls_token"),
            ("place", "visual.trunk.pos_embed"), ("norm.", "visual.trunk.norm."), ("blocks.", "visual.trunk.blocks."),
        ):  # fmt: skip
            if name.startswith(ours):
                name = theirs + name[len(ours) :]
                break
        for ours, theirs in (("self_attn.in_proj_", "attn.qkv."), ("self_attn.out_proj", "attn.proj"),
                             ("linear1", "mlp.fc1"), ("linear2", "mlp.fc2")):  # fmt: skip
            name = name.replace(ours, theirs)
        return name

    @classmethod
    def from_folder(cls, folder):
        from safetensors.torch import load_file

        path = folder / "open_clip_model.safetensors"
        if not path.is_file():
            raise ModelError(
                f"{folder}: there is no {path.name}; BiomedCLIP is published as a pickle, which is not loaded here: "
                "write its tensors with safetensors.torch.save_file once, and give that folder"
            )
        try:
            model = cls(load_file(path))
        except KeyError as error:
            raise ModelError(f"{path}: the tensor {error} is missing; this is not BiomedCLIP") from None
        expected = {cls.names(name): tensor for name, tensor in model.state_dict().items()}
        found = read_weights(path, expected)
        model.load_state_dict({name: found[cls.names(name)] for name in model.state_dict()})
        return model


class ClipSaliency:
    """gScoreCAM on the tokens of a ViT: the channels that the score leans on most, each tried as a mask on the image.

    saliency(image, text) -> [H, W] in 0..1
    """

    def __init__(self, towers, tokenizer, preprocessing=LIKE_CLIP):
        self.towers, self.tokenizer = towers.eval().requires_grad_(False), tokenizer
        self.preprocessing = preprocessing

    def __call__(self, image, text):
        pixels = to_pixel_values(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None])
        small = F.interpolate(pixels, (self.towers.side,) * 2, mode="bilinear", antialias=True)
        small = normalise(small, self.preprocessing)
        asked = self.tokenizer([text], truncation=True, max_length=self.towers.limit, return_tensors="pt")
        wanted = F.normalize(self.towers.text(asked), dim=-1)  # [1, E]

        def score(tokens):
            return (F.normalize(self.towers.image(tokens), dim=-1) * wanted).sum(-1)  # [B]

        tokens = self.towers.tokens(small).requires_grad_()
        (slope,) = torch.autograd.grad(score(tokens).sum(), tokens)
        best = slope[0, 1:].mean(0).topk(min(CHANNELS, tokens.shape[-1])).indices
        grid = round((tokens.shape[1] - 1) ** 0.5)
        maps = tokens[0, 1:, best].detach().T.reshape(-1, 1, grid, grid)  # [C, 1, g, g]
        maps = maps - maps.amin((-2, -1), keepdim=True)
        maps = maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-6)
        with torch.no_grad():
            shown = F.interpolate(maps, small.shape[-2:], mode="bilinear")  # each channel as a mask on the image
            weights = torch.cat([score(self.towers.tokens(small * part)) for part in shown.split(8)])
        saliency = (weights.softmax(0)[:, None, None, None] * maps).sum(0, keepdim=True)
        saliency = F.interpolate(saliency, image.shape[:2], mode="bilinear")[0, 0]
        saliency = saliency - saliency.min()
        return (saliency / saliency.max().clamp_min(1e-6)).numpy()

    @classmethod
    def from_pretrained(cls, checkpoint=CLIP):
        """A CLIP of transformers, or a folder with BiomedCLIP's tensors, its tokenizer and open_clip_config.json."""
        clip, clip_words, bert_words = of_transformers("CLIPModel", "CLIPTokenizerFast", "BertTokenizerFast")
        folder = Path(checkpoint)
        if str(checkpoint) == BIOMED_CLIP or (folder / OPEN_CLIP).is_file():
            config = read_json(folder / OPEN_CLIP)
            towers = BiomedClipTowers.from_folder(folder)
            words = len(towers.bert.embeddings.word_embeddings.weight)
            tokenizer = load_tokenizer(bert_words, folder, words, "BiomedCLIP")
            seen = config.get("preprocess_cfg", {})
            seen = {f"image_{name}": seen[name] for name in ("mean", "std") if name in seen}
            return cls(towers, tokenizer, LIKE_CLIP | seen)
        folder = fetch(checkpoint, ("clip",))
        model = load_model(clip, folder)
        tokenizer = load_tokenizer(clip_words, folder, model.config.text_config.vocab_size, "CLIP")
        return cls(ClipTowers(model), tokenizer)


class VqaAnswers:
    """Short answers of a BLIP to questions on shape, number and place: answer(image, region) -> a sentence."""

    def __init__(self, blip, tokenizer, questions=QUESTIONS):
        self.blip, self.tokenizer, self.questions = blip.eval().requires_grad_(False), tokenizer, questions

    @torch.inference_mode()
    def __call__(self, image, region=None):
        side = self.blip.config.vision_config.image_size
        pixels = to_pixel_values(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None])
        pixels = normalise(F.interpolate(pixels, (side, side), mode="bicubic", antialias=True), LIKE_CLIP)
        asked = self.tokenizer(list(self.questions), padding=True, return_tensors="pt")
        said = self.blip.generate(
            input_ids=asked["input_ids"], attention_mask=asked["attention_mask"],
            pixel_values=pixels.expand(len(self.questions), -1, -1, -1), max_new_tokens=8,
        )  # fmt: skip
        answers = [text.strip() for text in self.tokenizer.batch_decode(said, skip_special_tokens=True)]
        return ", ".join(answer for answer in answers if answer) or "no answer"

    @classmethod
    def from_pretrained(cls, checkpoint=VQA, **options):
        blip, words = of_transformers("BlipForQuestionAnswering", "BertTokenizerFast")
        folder = fetch(checkpoint, ("blip",))
        model = load_model(blip, folder)
        tokenizer = load_tokenizer(words, folder, model.config.text_config.vocab_size, "BLIP")
        return cls(model, tokenizer, **options)
