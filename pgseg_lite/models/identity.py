"""Which model is this? What must not be mixed, runs, answers and comparisons, is kept apart by these digits."""

import hashlib
import json

import torch


def fingerprint(model):
    """12 hex digits for the weights, and for what `kept_outside` lists: modules and values not in the state dict."""
    digest = hashlib.sha256()
    for part in (model, *getattr(model, "kept_outside", ())):
        if isinstance(part, torch.nn.Module):
            for tensor in part.state_dict().values():
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def answering(model):
    """The options that decide a model's answers, by name: what it says itself, or else its `options`."""
    return model.answering() if hasattr(model, "answering") else getattr(model, "options", {})
