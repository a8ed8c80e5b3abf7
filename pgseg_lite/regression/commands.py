"""`pgseg compare`, and the commands of `pgseg prompts` about perturbed and collected phrasings. Light to import."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import SettingsError
from ..experiments import HELD_OUT, LEARNERS, SEEDS
from ..prompts import PromptBank
from ..settings import PER_LEVEL, PROFILES, training_profiles


def add_prompt_commands(prompts, command):
    """`command(prompts, run, name, text)` makes the parser of one command."""
    worded = command(prompts, run_perturb, "perturb", "word a bank's phrasings worse by degrees, as a CSV table")
    worded.add_argument("bank", nargs="?", default="nuclei", help="a bundled bank, or the path of yours")
    worded.add_argument("--kinds", nargs="+", help="which perturbations; by default all that are in English")
    worded.add_argument("--describe", action="store_true", help="only say what each kind and its severities are")
    worded.add_argument("--severity", nargs="+", type=int, default=(1, 2, 3, 4, 5), help="0 is the phrasing as it is")
    worded.add_argument("--target", help="only the phrasings of this target")
    worded.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts")
    worded.add_argument("-o", "--output", type=Path, help="write the table to this CSV file instead of printing it")

    taken = command(prompts, run_import, "import", "make a draft bank from the free text of a CSV file")
    taken.add_argument("csv", type=Path, help="a column 'text', and where they are known 'target', 'level' and 'count'")
    taken.add_argument("-o", "--output", type=Path, required=True, help="the draft, a new YAML file")
    taken.add_argument("--bank", default="nuclei", help="the bank whose wordings suggest where a text belongs")
    taken.add_argument("--keep-flagged", action="store_true", help="keep texts that may hold personal data, for review")
    taken.add_argument("--encoding", help="of the file; by default UTF-8, or cp1252 where that fails")

    review = command(prompts, run_review, "review", "decide what is undecided in a draft; every decision is saved")
    review.add_argument("draft", type=Path, help="what `pgseg prompts import` wrote")


def run_perturb(args):
    from .perturb import describe_kinds, perturb

    if args.describe:
        print(describe_kinds())
        return
    if args.output and not args.output.absolute().parent.is_dir():
        raise SettingsError(f"{args.output.parent}: no such folder for the table; create it first")
    bank = PromptBank.load(args.bank)
    table = perturb(bank, args.kinds, args.severity, args.seed, bank.select(args.target))
    if not args.output:
        print(table.to_csv(index=False), end="")
        return
    partial = args.output.with_name(args.output.name + ".part")
    table.to_csv(partial, index=False)
    partial.replace(args.output)
    print(f"{len(table)} perturbed phrasings: {args.output}")


def run_import(args):
    from .collect import import_phrases

    print("the first time, the sentence encoder takes up to half a minute for the bank's own phrasings", flush=True)
    draft = import_phrases(args.csv, args.output, PromptBank.load(args.bank), args.keep_flagged, args.encoding)
    print("\n".join(draft.notes))
    print("what looks like personal data was searched for by rules: a help, and no guarantee")
    todo = f"pgseg prompts {'review' if draft.report['undecided'] else 'lint'} {args.output}"
    print(f"{draft.report['phrasings']} phrasings, {draft.report['undecided']} undecided; go on with: {todo}")


def run_review(args):
    from .review import Review, walk

    walk(Review(args.draft))


ABOUT_COMPARE = "fine-tune without and with the group terms on your own images and bank, and say whether they help"


def add_compare_options(parser):
    """All but the options of data, bank, device and segmenter, which other commands have too."""
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; a killed command goes on there")
    parser.add_argument("--start", help="checkpoint to fine-tune; by default `fixed` for lite, the hub's for others")
    parser.add_argument("--profile", choices=PROFILES, default="lite", help="steps, seeds and phrasings to begin with")
    counts = ", ".join(f"{name} {len(seeds)}" for name, seeds in SEEDS.items())
    parser.add_argument("--seeds", type=int, help=f"pairs of runs; by default {counts}")
    parser.add_argument("--held-out", type=float, default=HELD_OUT, help="share of the source images to test on")
    parser.add_argument(
        "--per-level", type=int, help=f"phrasings a target and level; by default {PER_LEVEL}; 0 for all"
    )
    settings = {"steps": "training steps of each run", "k": "phrasings in a group", "view": "side of a training view"}
    for name, text in settings.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text}; by default the profile's")


def run_compare(args, read_data, read_segmenter):
    """`read_data(args)` opens the dataset, `read_segmenter(args, checkpoint)` the model, of the shared options."""
    profiles = LEARNERS["lite"].settings if args.segmenter == "lite" else training_profiles(args.segmenter)
    given = {name: value for name in ("steps", "k", "view") if (value := getattr(args, name)) is not None}
    settings, bank, data = replace(profiles[args.profile], **given), PromptBank.load(args.bank), read_data(args)
    from .compare import compare  # torch, from here on

    start = partial(read_segmenter, args, args.start or ("fixed" if args.segmenter == "lite" else None))
    seeds = len(SEEDS[args.profile]) if args.seeds is None else args.seeds
    per_level = PER_LEVEL[args.profile] if args.per_level is None else args.per_level
    options = dict(start=start, seeds=seeds, held_out=args.held_out, per_level=per_level or None)
    found = compare(data, bank, args.output, settings, **options)
    print(f"{found.text()}\n{args.output / 'compare.json'}, {args.output / 'compare.csv'}")
