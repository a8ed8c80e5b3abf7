"""`seg-zero` and `vision-reasoner`: a language model that sees names objects, SAM2 draws them, their union is the mask.

    image    -> Qwen2.5-VL's vision tower -> tokens of the image, and SAM2's embeddings, each once per image
    phrasing -> the published question -> thinking and an answer in JSON: boxes and points
    answer   -> SAM2, a mask per object -> their union

The questions, the 840 pixels a side and the form of the answers are what these models were trained with. They stand,
without blanks after full stops, in the inference code of github.com/dvlab-research, now JIA-Lab-research: Seg-Zero's
inference_scripts/infer.py and VisionReasoner's vision_reasoner/models/vision_reasoner_model.py. Seg-Zero answers with
one object, whatever was asked, so at best with one nucleus.
"""

import ast
import json
import re
import warnings
from collections import Counter, namedtuple
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import ModelError, SettingsError
from .access import LIKE_CLIP, fetch, load_model, load_part, of_transformers, standardise
from .base import SegmentationOutput, as_batch, check_prompts
from .finetune import gpu_memory
from .lite import to_pixel_values
from .sam2 import EMPTY, Sam2Masks, at_half, one_view

SIDE = 840  # of the square that Qwen2.5-VL sees, in which its answers count pixels
PATCH, MERGE = 14, 2  # one token of the image is a square of 2 x 2 patches
SAM2 = "facebook/sam2-hiera-large"  # the one that both models are published with
AT_ONCE = 8  # phrasings answered together; in half precision that may change the last words of an answer
BESIDES = 3.0  # GiB beside the weights, for the answers' attention cache and SAM2, a guess

CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
FORM = "i.e., <think> thinking process here </think><answer>{answer}</answer>"

# Per image: the tokens [n, D] of Qwen2.5-VL, SAM2's embeddings, and the size of the image itself.
ImageFeatures = namedtuple("ImageFeatures", "tokens embeddings size")


class ReasoningSegmenter(nn.Module):
    """sam2: the checkpoint of SAM2 that draws. max_new_tokens: of thinking and answer together.

    Presence says whether the answer named an object in the image: yes or no, no probability. An answer that cannot be
    read, names nothing, or lies outside of the image gives an empty mask; `unusable` counts them by reason.
    """

    why_not_trained = "as in the paper it is only tested; train lite or sam3"
    name: str
    hub_name: str
    question: str
    example: str
    longest: int
    trimmed: str  # off the ends of a phrasing

    def __init__(self, qwen, tokenizer, *, sam2, max_new_tokens=None):
        super().__init__()
        if max_new_tokens is not None and max_new_tokens < 1:
            raise SettingsError(
                f"max_new_tokens is {max_new_tokens}; an answer takes at least 1, published {self.longest}"
            )
        self.qwen, self.tokenizer, self.sam2 = qwen, tokenizer, sam2
        self.max_new_tokens = max_new_tokens or self.longest
        self.unusable = Counter()

    @torch.inference_mode()
    def encode_image(self, images):
        pixels = torch.from_numpy(as_batch(images)).permute(0, 3, 1, 2)  # [B, 3, H, W]
        embeddings = self.sam2.encode(to_pixel_values(pixels.to(self.sam2.device)))
        return [
            ImageFeatures(self.see(image), one_view(embeddings, i), tuple(image.shape[-2:]))
            for i, image in enumerate(pixels)
        ]

    def see(self, image):
        """uint8 [3, H, W] -> the tokens of the image [n, D], n = 900."""
        patches, grid = to_patches(image), torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]])
        device = self.qwen.device
        seen = self.qwen.get_image_features(patches.to(device), grid.to(device), return_dict=True)
        return torch.cat(list(seen.pooler_output))

    def encode_text(self, prompts):
        """The phrasings themselves: they are read together with the image."""
        return check_prompts(prompts)

    @torch.inference_mode()
    def decode(self, image_features, text_features):
        """Every image with every phrasing."""
        masks, presence = [], []
        for features in image_features:
            portions = [text_features[i : i + AT_ONCE] for i in range(0, len(text_features), AT_ONCE)]
            answers = [answer for portion in portions for answer in self.answer(features.tokens, portion)]
            drawn = [self.draw(features, *pair) for pair in zip(text_features, answers, strict=True)]
            masks.append(torch.stack([logits for logits, _ in drawn]))  # [K, H, W]
            presence.append(torch.stack([there for _, there in drawn]))  # [K]
        return SegmentationOutput(at_half(torch.stack(masks)), torch.stack(presence))

    def predict(self, image, prompts):
        """Masks for one image [H, W, 3] or several, for every phrasing."""
        self.eval()
        text_features = self.encode_text(prompts)
        return self.decode(self.encode_image(image), text_features)

    def answering(self):
        return {"max_new_tokens": self.max_new_tokens}

    def answer(self, image_tokens, texts):
        """What the model says to each of K phrasings about one image, always the same: greedy decoding."""
        image = "<|image_pad|>" * len(image_tokens)
        chats = [CHAT.format(image=image, question=self.ask(text)) for text in texts]
        batch = self.tokenizer(chats, padding=True, padding_side="left", return_tensors="pt").to(self.qwen.device)
        ids = batch["input_ids"]  # [K, L]
        of_image = ids == self.qwen.config.image_token_id
        embeddings = self.qwen.get_input_embeddings()(ids)  # [K, L, D]
        embeddings[of_image] = image_tokens.repeat(len(texts), 1).to(embeddings)
        grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * len(texts), device=ids.device)
        said = self.qwen.generate(
            input_ids=ids, inputs_embeds=embeddings, attention_mask=batch["attention_mask"],
            image_grid_thw=grid, mm_token_type_ids=of_image.int(), pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=self.max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        return self.tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)

    def ask(self, text):
        return self.question.format(text=text.lower().strip(self.trimmed), form=FORM.format(answer=self.example))

    def draw(self, features, text, answer):
        """Mask logits [H, W] of all objects that the answer names, and whether there are any, as a logit."""
        objects = self.read(answer)
        inside = [placed for found in objects or () if (placed := place(found, features.size))]
        if inside:
            boxes, points = (torch.tensor(part, dtype=torch.float32) for part in zip(*inside, strict=True))
            logits, _ = self.sam2.union(features.embeddings, features.size, boxes=boxes, points=points)
            return logits, logits.new_tensor(-EMPTY)
        self.report(text, "cannot be read" if objects is None else "is outside" if objects else "names nothing")
        logits = features.embeddings[0].new_full(features.size, EMPTY)
        return logits, logits.new_tensor(EMPTY)

    def report(self, text, reason):
        if not self.unusable:
            said = f"{self.name}'s answer to {text!r} {reason}, so its mask is empty"
            warnings.warn(f"{said}; said once, the segmenter's .unusable counts all such answers", stacklevel=4)
        self.unusable[reason] += 1

    def save_pretrained(self, folder):
        for part, place in ((self.qwen, folder), (self.tokenizer, folder), (self.sam2, Path(folder) / "sam2")):
            part.save_pretrained(place)

    @classmethod
    def from_pretrained(cls, checkpoint=None, device="cpu", sam2=None, **options):
        """From the hub by name, or a folder. SAM2 comes from `sam2`, a folder of that name inside, or the hub."""
        model_class, tokenizer_class = of_transformers("Qwen2_5_VLForConditionalGeneration", "Qwen2TokenizerFast")
        if sam2 is None:
            own = Path(checkpoint or "") / "sam2"
            sam2 = own if checkpoint and own.is_dir() else SAM2
        sam2 = Sam2Masks.from_pretrained(sam2, device)  # the small one first
        folder = fetch(cls.hub_name if checkpoint is None else checkpoint, ("qwen2_5_vl",))
        tokenizer = load_part(tokenizer_class, folder)
        qwen = load_model(model_class, folder, half(device))
        if tokenizer.convert_tokens_to_ids("<|image_pad|>") != qwen.config.image_token_id:
            raise ModelError(f"{folder}: the tokenizer does not know <|image_pad|>; fetch its files again")
        needed, there = qwen.get_memory_footprint() / 2**30 + BESIDES, gpu_memory(torch.device(device))
        if there is not None and needed > there:
            said = f"{cls.name} needs about {needed:.0f} GiB of GPU memory and {there:.0f} are there"
            raise ModelError(f"{said}; take a larger GPU, or a smaller checkpoint")
        return cls(qwen, tokenizer, sam2=sam2, **options).to(device).eval()


def half(device):
    """What billions of weights are held in: half precision on a GPU."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class SegZeroSegmenter(ReasoningSegmenter):
    name, hub_name, longest, trimmed = "seg-zero", "Ricky06662/Seg-Zero-7B", 1024, "."
    question = (
        "Please find '{text}' with bbox and points."
        "Compare the difference between objects and find the most closely matched one."
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
        "Output the one bbox and points of two largest inscribed circles inside the interested object in JSON format."
        "{form}"
    )
    example = "{'bbox': [10,100,200,210], 'points_1': [30,110], 'points_2': [35,180]}"

    @staticmethod
    def read(answer):
        """The first {...} anywhere in the answer: one box and two points."""
        found = parse(re.search(r"{[^}]+}", answer))
        if not isinstance(found, dict):
            return None
        box = next((value for key, value in found.items() if "bbox" in str(key).lower()), None)
        points = [value for key, value in found.items() if "points" in str(key).lower()][:2]
        return [(box, points)] if are_numbers(box, 4) and len(points) == 2 and all(map(is_point, points)) else None


class VisionReasonerSegmenter(ReasoningSegmenter):
    name, hub_name, longest, trimmed = "vision-reasoner", "Ricky06662/VisionReasoner-7B", 2048, '."?!'
    question = (
        'Please find "{text}" with bboxs and points.'
        "Compare the difference between object(s) and find the most closely matched object(s)."
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
        "Output the bbox(es) and point(s) inside the interested object(s) in JSON format."
        "{form}"
    )
    example = (
        '[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, {"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]'
    )

    @staticmethod
    def read(answer):
        """All of <answer>...</answer>: a list of boxes, each with a point."""
        found = parse(re.search(r"<answer>\s*(.*?)\s*</answer>", answer, re.DOTALL))
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            return None
        objects = [(item.get("bbox_2d"), [item.get("point_2d")]) for item in found]
        return objects if all(are_numbers(box, 4) and is_point(point) for box, (point,) in objects) else None


def parse(match):
    """JSON, or the same with the single quotes of Seg-Zero's own example; None if it is neither."""
    text = match[match.re.groups] if match else ""
    for reader in (json.loads, ast.literal_eval):
        try:
            return reader(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def are_numbers(values, count):
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and abs(v) < 1e6 for v in values)  # NaN and a thousand digits are not
    )


def is_point(value):
    return are_numbers(value, 2)


def place(found, size):
    """(box, points) from the square that the model saw to pixels of the image, cut at its border; None outside."""
    height, width = size

    def scaled(values):
        sides = (width, height) * (len(values) // 2)
        return [min(max(round(v * side / SIDE), 0), side) for v, side in zip(values, sides, strict=True)]

    box, points = scaled(found[0]), [scaled(point) for point in found[1]]
    return (box, points) if box[0] < box[2] and box[1] < box[3] else None


def to_patches(image):
    """uint8 [3, H, W] -> [n, 3 * 2 * 14 * 14]: patches in the order in which two by two become a token.

    A still image is a film of two equal frames.
    """
    pixels = F.interpolate(image[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]  # on bytes as PIL does it
    pixels = standardise(pixels / 255, LIKE_CLIP)  # [3, SIDE, SIDE]
    blocks = SIDE // (PATCH * MERGE)
    patches = pixels.reshape(3, blocks, MERGE, PATCH, blocks, MERGE, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
    return patches.unsqueeze(5).expand(*[-1] * 5, 2, -1, -1).reshape(-1, 3 * 2 * PATCH * PATCH)
