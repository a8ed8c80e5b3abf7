"""Any text-prompted model as something that can be asked: image and phrasing in, mask out.

A name of `models.SEGMENTERS`     one of this package's that reads words; its image encoder runs once per image
`package.module:function`         a function (uint8 [H, W, 3], text) -> bool or probability [H, W], in its own process
a Python function                 the same, in this process: for notebooks
a command with {image} {phrasing} {output}: reads a PNG, writes a mask as PNG; no shell
http:// or https://               POST {"image": base64 of a PNG, "phrasing": text}; the answer is a PNG (Content-Type
                                  image/png) or JSON {"mask": base64 of a PNG}. $PGSEG_TOKEN is sent as Bearer token

A mask file is 0 outside and one other value inside. Whatever goes wrong with an item is that item's own failure.
Kept answers belong to one model. A torch module is known by its weights and `options` (models/identity.py has more);
into any other object nobody can look, so without a version its answers are kept for this object alone.
An adapter of your own has `name`, `fingerprint` and `asking(image)`, a context that gives a function from text to mask;
it is asked by one thread, or by as many as its `workers` says. Models that answer differently need other fingerprints.
"""

import re
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from threading import Thread
from uuid import uuid4

import torch

from ..errors import ModelError, SettingsError
from ..evaluation import check_name, predict_packed
from ..metrics import pack
from ..models import SEGMENTERS, identity, load_segmenter
from .answers import Answer, as_mask, fingerprint, reason_of
from .worker import said

READERS = [name for name, kind in SEGMENTERS.items() if not kind.startswith("visual.")]  # the others read no words


def adapt(model="lite", checkpoint=None, device=None, *, version="", timeout=60.0, retries=3, workers=4, **options):
    """A model that `measure` can ask. `options` are those of `load_segmenter`, such as `truncate` of sam3.

    version   what you call this state of a model that cannot be looked into: kept answers belong to one version
    timeout   seconds for one answer; retries: of a request to an endpoint; workers: commands or requests at a time
    """
    if not timeout > 0:
        raise SettingsError(f"timeout is {timeout}; give seconds above zero")
    if retries < 0 or not 1 <= workers <= 64:
        raise SettingsError(f"retries is {retries} and workers {workers}; use retries >= 0 and 1 to 64 workers")
    if isinstance(model, str) and model in SEGMENTERS:
        refuse_visual(model, model not in READERS)
        return Builtin(load_segmenter(model, checkpoint, device, **options), version)
    if options:
        raise ModelError(f"options such as {next(iter(options))} are for {', '.join(READERS)}; leave them out")
    if hasattr(model, "asking"):
        return Asked(model, getattr(model, "workers", 1))
    if hasattr(model, "predict"):
        check_name(model)
        refuse_visual(model.name, hasattr(model, "visual_prompt"))
        return Builtin(model, version)
    if callable(model):
        return Asked(InProcess(model, version, timeout), 1)
    if checkpoint:
        raise ModelError(f"a checkpoint is for {', '.join(READERS)}; {model!r} loads its own weights")
    model = str(model)
    if re.match(r"https?://", model):
        from .endpoint import Endpoint

        return Asked(Endpoint(model, version, timeout, retries), workers)
    if re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", model):
        from .processes import Worker

        return Asked(Worker(model, version, timeout), 1)
    if "{" in model:
        from .processes import Command

        return Asked(Command(model, version, timeout), workers)
    kinds = f"one of {', '.join(READERS)}, module:function, a command with {{image}} {{phrasing}} {{output}}, or a URL"
    raise ModelError(f"{model!r} names no model; give {kinds}")


def refuse_visual(name, visual):
    if visual:
        said = f"{name} reads no words: it is shown the true nuclei, and no phrasing changes that"
        raise ModelError(f"{said}; choose a segmenter that takes phrasings, and score this one with `pgseg evaluate`")


class Builtin:
    """A Segmenter, asked with all phrasings of an image at once. It runs in this process, without a time limit."""

    def __init__(self, model, version=""):
        self.model, self.name, self.features, self.refused = model, model.name, {}, {}
        known = self.identity() if isinstance(model, torch.nn.Module) else [version or uuid4().hex]
        self.fingerprint = fingerprint(model.name, version, *known)

    def identity(self):
        """All that can be seen of a module: weights, options, and what it makes of a word, often outside of them."""
        self.model.eval()
        word = self.model.encode_text(["nuclei"]) if hasattr(self.model, "encode_text") else ""
        if isinstance(word, torch.Tensor):
            word = word.detach().float().cpu().contiguous().numpy().tobytes()
        return identity.fingerprint(self.model), identity.answering(self.model), word

    def answers(self, sample, texts):
        """(phrasing, Answer) for each; what fails with the others is asked again alone."""
        self.encode([text for text in texts if text not in self.features and text not in self.refused])
        yield from ((text, Answer(None, reason=self.refused[text])) for text in texts if text in self.refused)
        texts = [text for text in texts if text not in self.refused]
        if not texts:
            return
        try:
            packed, presence = self.predict(sample, texts)
        except Exception as error:  # a model from outside may raise anything
            reason = reason_of(error)  # the error itself holds the memory of the pass that failed
        else:
            yield from zip(texts, map(Answer, packed, map(float, presence)), strict=True)
            return
        if len(texts) == 1:
            yield texts[0], Answer(None, reason=reason)
            return
        for text in texts:
            yield from self.answers(sample, [text])

    def predict(self, sample, texts):
        features = None
        if self.features:
            features = [self.features[text] for text in texts]
            if isinstance(features[0], torch.Tensor):  # encoded at different times, they may differ in length
                features = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
        return predict_packed(self.model, sample, texts, features)

    def close(self):
        pass

    def encode(self, texts):
        """Text features of phrasings not seen before, once a run; one that is refused fails on every image."""
        if not texts or not hasattr(self.model, "encode_text"):
            return
        try:
            self.features |= zip(texts, self.model.encode_text(texts), strict=True)  # of a tensor or a list
        except Exception as error:
            if len(texts) > 1:
                for text in texts:
                    self.encode([text])
            else:
                self.refused[texts[0]] = reason_of(error)


class Asked:
    """A model that takes one phrasing at a time, asked by `workers` threads."""

    def __init__(self, model, workers):
        self.model, self.workers = model, workers
        self.name, self.fingerprint = model.name, model.fingerprint

    def answers(self, sample, texts):
        with self.model.asking(sample.image) as ask:
            pool = ThreadPoolExecutor(self.workers)
            left, running = deque(texts), {}
            try:
                while left or running:
                    while left and len(running) < 2 * self.workers:  # not all: who gives up would pay for the rest
                        text = left.popleft()
                        running[pool.submit(answer, ask, text, sample.image.shape[:2])] = text
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future.result()
            finally:  # also when whoever asks gives up
                pool.shutdown(cancel_futures=True)

    def close(self):
        if hasattr(self.model, "close"):
            self.model.close()


def answer(ask, text, shape):
    try:
        return Answer(pack(as_mask(ask(text), shape)))
    except Exception as error:
        return Answer(None, reason=reason_of(error))


class InProcess:
    """A Python function. One that hangs cannot be ended from outside, so it is left behind on its thread."""

    def __init__(self, function, version, timeout):
        self.function, self.timeout = function, timeout
        self.name = getattr(function, "__name__", type(function).__name__)
        # What a closure holds cannot be seen: without a version its answers are of this object alone.
        self.fingerprint = fingerprint("function", self.name, version or uuid4().hex)

    @contextmanager
    def asking(self, image):
        yield partial(self.ask, image)

    def ask(self, image, text):
        result = {}

        def call():
            try:
                result["mask"] = self.function(image.copy(), text)
            except BaseException as error:
                result["error"] = error

        thread = Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            raise ModelError(f"no answer within {self.timeout:g} s")
        if "error" in result:
            raise ModelError(said(result["error"]))
        return result["mask"]
