"""Frozen text encoders of published models: every phrasing is read once, and none is cut in silence."""

import warnings

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import ModelError


class TextTower:
    """Tokenizer and frozen text encoder. Not a module: neither checkpoints nor the GPU should hold its weights.

    A subclass has `reader`, the model's name in messages, and `_embed`, phrasings -> a tensor [L, D] or [D] for each.
    """

    reader: str
    dimensions = 3  # of the features of K phrasings: [K, L, D], or 2 for [K, D]
    ending = 1  # tokens that close every text, so that a cut one keeps them too

    def __init__(self, tokenizer, parts, limit, truncate):
        self.tokenizer, self.limit, self.truncate = tokenizer, limit, truncate
        self.parts = [part.eval().requires_grad_(False) for part in parts]
        self._features = {}  # phrasing -> its features, on the CPU
        self._warned = set()

    def encode(self, texts, device):
        """Features of all texts in one tensor [N, ...], those of shorter texts filled up with zeros."""
        self.check_lengths(texts)
        if new := [text for text in dict.fromkeys(texts) if text not in self._features]:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # weights moved in inference mode would stay marked by it
                for part in self.parts:
                    part.to(device)
                for start in range(0, len(new), 64):
                    batch = new[start : start + 64]
                    self._features.update(zip(batch, self._embed(batch, device), strict=True))
                for part in self.parts:  # images can use their memory better; moving takes a fraction of a second
                    part.to("cpu")
        return pad_sequence([self._features[text] for text in texts], batch_first=True).to(device)

    def tokens(self, texts, device, padding="max_length"):
        options = dict(padding=padding, max_length=self.limit, truncation=True, return_tensors="pt")
        return self.tokenizer(texts, **options).to(device)

    def prepare(self, text):
        """A phrasing as its encoder wants it written."""
        return text

    def check_lengths(self, texts):
        """Refuse phrasings that are too long, or warn of each and what it loses when `truncate` was asked for."""
        lost = self.what_is_lost(texts)
        if not lost:
            return
        listed = [f"{text!r} loses {words!r}" for text, words in lost.items()]
        said = f"{self.reader} reads {self.limit} tokens, too few for {len(lost)} of {len(texts)} phrasings"
        if not self.truncate:
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            some = "; ".join(listed[:3]) + more
            raise ModelError(f"{said}: {some}; shorten them, or cut them with truncate=True (--option truncate=true)")
        if not lost.keys() <= self._warned:
            warnings.warn(f"{said}, and they are cut:\n" + "\n".join(listed), stacklevel=3)
            self._warned |= lost.keys()

    def what_is_lost(self, texts):
        """Over-long phrasing -> its words that the encoder would never see."""
        written = [self.prepare(text) for text in texts]
        encoded = self.tokenizer(written, truncation=False, return_offsets_mapping=True, verbose=False)
        lost = {}
        for text, whole, spans in zip(texts, written, encoded["offset_mapping"], strict=True):
            if len(spans) > self.limit:
                lost[text] = whole[spans[self.limit - self.ending][0] :]
        return lost
