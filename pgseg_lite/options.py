"""What `pgseg train`, `evaluate` and `data` have in common on the command line: options, and what they stand for."""

import argparse
import os
from contextlib import contextmanager
from dataclasses import fields, replace

from .errors import SettingsError
from .settings import SEGMENTER_NAMES, TRAINING, training_profiles


def add_data_options(parser, split):
    parser.add_argument("--dataset", default="synthetic", help="a dataset by name; `pgseg data list` shows them")
    parser.add_argument("--root", help="its folder; by default it is looked for under $PGSEG_DATA")
    parser.add_argument("--split", default=split, help="which split of the dataset")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the split's samples to use")
    parser.add_argument("--data-seed", type=int, default=0, help="decides which samples that share consists of")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile in pixels; 0 for whole images")
    parser.add_argument("--size", type=int, help="number of tiles (synthetic only)")
    parser.add_argument("--shift", help="a domain shift by name (synthetic only)")
    parser.add_argument("--annotations", help="the JSON file, where the root holds several (coco only)")
    parser.add_argument("--hub", action="store_true", default=None, help="the copy on the hub (pannuke only)")


def read_data(args):
    from .data import load_dataset

    names = ("size", "shift", "annotations", "hub")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    tile = args.tile or None
    data = load_dataset(args.dataset, args.root, args.split, args.fraction, args.data_seed, tile, **options)
    say(f"{data.name} {data.split}: {len(data)} samples, digest {data.digest}")
    return data


def check_file(path, what):
    """Of a file that is written at the end of long work: what would stop it then stops it now."""
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"{path.parent}: no such folder for {what}; create it first")
    if path.is_dir():
        raise SettingsError(f"{path}: a folder; name a file in it for {what}")


def check_folder(path, what):
    """The same of a folder, which is made with those above it."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise SettingsError(f"{there}: a file; give a folder for {what}")


def count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_bank_and_device(parser):
    parser.add_argument("--bank", default="nuclei", help="a bundled prompt bank, or the path of your own")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a GPU where there is one")


def add_model_options(parser):
    add_bank_and_device(parser)
    parser.add_argument("--segmenter", choices=SEGMENTER_NAMES, default="lite", help="which model")
    add_option_of_model(parser)


def add_option_of_model(parser):
    parser.add_argument(
        "--option", type=option, action="append", metavar="NAME=VALUE", default=[],
        help="an option of that model, such as tile=336 or truncate=true for sam3; may be given again",
    )  # fmt: skip


def option(text):
    """NAME=VALUE -> (name, value as none, true, false, a number or a word)."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    words = {"none": None, "true": True, "false": False}
    if value.lower() in words:
        return name, words[value.lower()]
    for number in (int, float):
        try:
            return name, number(value)
        except ValueError:
            continue
    return name, value


def read_segmenter(args, checkpoint):
    from .models import load_segmenter

    with options_of_model(args) as options:
        return load_segmenter(args.segmenter, checkpoint, args.device, **options)


@contextmanager
def options_of_model(args):
    try:
        yield dict(args.option)
    except TypeError as error:
        if not args.option:
            raise
        given = ", ".join(f"{name}={value}" for name, value in args.option)
        raise SettingsError(f"--option {given}: a value has the wrong type ({error}); correct it") from error


def add_settings(parser):
    """An option for each field of any segmenter's training settings, none with a default: the profile has them."""
    defaults = {name: profiles["lite"] for name, profiles in TRAINING.items()}
    known = {field.name: field for settings in defaults.values() for field in fields(settings)}
    group = parser.add_argument_group("settings", "each replaces one setting of the profile")
    for name, field in known.items():
        how = {"nargs": "+"} if name == "levels" else {"type": type(field.default)}
        if isinstance(field.default, bool | None):
            how = {"action": argparse.BooleanOptionalAction}
        values = {}  # as it is printed -> segmenters
        for segmenter, settings in defaults.items():
            if name in {field.name for field in fields(settings)}:
                value = getattr(settings, name)
                values.setdefault("as fits" if value is None else str(value), []).append(segmenter)
        of_all = [*values.values()] == [[*defaults]]
        listed = [f"{', '.join(who)}: {value}" for value, who in values.items()]
        shown = next(iter(values)) if of_all else "; ".join(listed)
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=shown, **how)


def read_settings(args):
    """The profile of the segmenter with what was given on the command line in its place."""
    profile = training_profiles(args.segmenter)[args.profile]
    known = {field.name for field in fields(profile)}
    every = {field.name: name for name, profiles in TRAINING.items() for field in fields(profiles["lite"])}
    given = {name: getattr(args, name) for name in every if hasattr(args, name)}
    if unknown := [name for name in given if name not in known]:
        owners = [n for n, p in TRAINING.items() if unknown[0] in {field.name for field in fields(p["lite"])}]
        said = f"{unknown[0]} is a setting of {', '.join(owners)}"
        raise SettingsError(f"{said}; add --segmenter {owners[0]}, or leave it out")
    if "levels" in given:
        given["levels"] = tuple(given["levels"])
    return replace(profile, **given)


def say(text):
    """Print once, however many processes run."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
