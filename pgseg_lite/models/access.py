"""Weights that others publish: find them, or say in one sentence what is in the way and what to do."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from ..errors import ModelError, first_line

OPTIONS_FILE = "pgseg.json"  # what a segmenter does with its model's answers: a checkpoint is read as it was trained
PREPROCESSING_FILE = "preprocessor_config.json"  # of transformers' image processors
LIKE_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
LIKE_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
PATTERNS = ["*.json", "*.txt", "*.safetensors"]  # never pickled weights


def fetch(checkpoint, model_types):
    """The folder of a transformers checkpoint whose config.json names one of `model_types`: a local one, or the hub's.

    Small files come first, so that whatever is wrong shows before gigabytes are fetched. Several processes may ask at
    once: the hub's client locks each file, so that one of them fetches it and the others wait.
    """
    if os.environ.get("RANK", "0") != "0":  # of several processes one shows its progress
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bars()
        disable_progress_bar()
    folder = Path(checkpoint)
    if not folder.is_dir():
        if str(checkpoint).count("/") != 1 or folder.is_absolute():
            raise ModelError(f"{checkpoint}: no such checkpoint folder; give the folder that training wrote")
        check_model_type(download(str(checkpoint), PATTERNS[:2]), model_types)
        folder = download(str(checkpoint), PATTERNS)
    check_model_type(folder, model_types)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: there are no weights (*.safetensors) here; copy the checkpoint again")
    return folder


def download(name, patterns):
    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    log_in = "run `hf auth login`" if get_token() is None else "check that your token may read it"
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        said = f"its licence must be accepted first; do so on its page of the Hugging Face hub, then {log_in}"
        raise ModelError(f"{name}: {said}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{name}: the hub shows no such repository; check the name, and {log_in}") from error
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            said = f"the hub answers {error.response.status_code}; {log_in}, or try again later"
            raise ModelError(f"{name}: {said}") from error
        said = "neither a folder here nor in this machine's cache, and the hub cannot be reached"
        raise ModelError(f"{name}: {said} ({type(error).__name__}); connect, or give a folder") from error


def check_model_type(folder, model_types):
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: not a checkpoint, config.json is missing; give a folder that has it")
    found = read_json(path).get("model_type")
    if found not in model_types:
        said = f"model_type is {found!r}, not {model_types[0]!r}, so this is another model's checkpoint"
        raise ModelError(f"{path}: {said}; give one of {model_types[0]}")


def read_json(path):
    """The entries of a JSON file, none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(entries, dict):
        raise ModelError(f"{path}: holds no entries, only {type(entries).__name__}; restore the file")
    return entries


def read_preprocessing(folder, usual):
    """What a checkpoint says of the images it was trained on, and `usual` where it says nothing."""
    return usual | read_json(Path(folder) / PREPROCESSING_FILE)


def save_preprocessing(folder, preprocessing):
    (Path(folder) / PREPROCESSING_FILE).write_text(json.dumps(preprocessing, indent=2) + "\n")


def normalise(pixel_values, preprocessing):
    """-1..1 -> the mean and standard deviation that the encoder was trained with, per channel."""
    return standardise(pixel_values / 2 + 0.5, preprocessing)


def standardise(pixels, preprocessing):
    """The same from 0..1."""
    mean, std = (pixels.new_tensor(preprocessing[name])[:, None, None] for name in ("image_mean", "image_std"))
    return (pixels - mean) / std


def to_square(pixels, side, mode="bilinear"):
    """[B, 3, H, W] to the one size that a model takes: a square, whatever the image's shape."""
    if pixels.shape[-2:] == (side, side):
        return pixels
    return F.interpolate(pixels, (side, side), mode=mode, antialias=True)


def of_transformers(*names):
    """Classes of transformers by name, or a sentence on what to install."""
    import transformers

    found = []
    for name in names:
        try:
            found.append(getattr(transformers, name))
        except (AttributeError, ImportError) as error:  # not there; or there, and in need of another package
            why = f" that can be imported ({first_line(error)})" if isinstance(error, ImportError) else ""
            said = f"transformers {transformers.__version__} has no {name}{why}"
            raise ModelError(f"{said}; run `pip install -U 'transformers>=5'`, or use lite") from error
    return found


def load_model(kind, folder, dtype=torch.float32):
    """A model with every one of its tensors read from the folder."""
    model, report = load_part(kind, folder, dtype=dtype, output_loading_info=True, use_safetensors=True)
    if report["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(report["missing_keys"])
        said = f"{len(missing)} tensors are missing, {missing[0]} among them"
        raise ModelError(f"{folder}: {said}; this is not a whole checkpoint of {kind.__name__}, so fetch it again")
    return model


def load_tokenizer(kind, folder, entries, reader):
    tokenizer = load_part(kind, folder)
    if len(tokenizer) < entries:  # it would read every word as unknown
        said = f"the tokenizer has {len(tokenizer)} entries, too few for {reader}"
        raise ModelError(f"{folder}: {said}; fetch its files again")
    return tokenizer


def load_part(kind, folder, **options):
    """What `kind` reads from the folder, or what is wrong with the folder."""
    try:
        return kind.from_pretrained(folder, **options)
    except Exception as error:  # transformers raises whatever the file format's own reader does
        said = f"{kind.__name__} cannot be read ({first_line(error)})"
        raise ModelError(f"{folder}: {said}; copy the checkpoint again") from error


@contextmanager
def saving(folder):
    """A new folder to save in, whose files then come into `folder`: each whole, config.json last, that on top last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="saving-") as partial:
        yield Path(partial)
        files = [file for file in Path(partial).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: (file.name == "config.json", -len(file.parts))):
            target = folder / file.relative_to(partial)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
