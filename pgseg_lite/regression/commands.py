"""What `pgseg robustness`, `pgseg compare` and parts of `pgseg prompts` take on the command line. Light to import."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import SettingsError
from ..experiments import HELD_OUT, LEARNERS, SEEDS
from ..files import write_text
from ..options import add_option_of_model, check_file, options_of_model
from ..prompts import LEVELS, PromptBank
from ..settings import PER_LEVEL, PROFILES, training_profiles

ABOUT_ROBUSTNESS = "measure how far a model's masks move with wording, and gate on it"
EPILOG = """\
models
  lite, sam3, ...              a segmenter of this package that reads words, with --checkpoint and --option
  package.module:function      (uint8 array [H, W, 3], text) -> bool or probability [H, W]; runs in a process of its own
  "segment {image} {phrasing} {output}"   a command: reads a PNG, writes a mask as PNG (0 outside, one value inside)
  https://host/path            POST {"image": base64 PNG, "phrasing": text} -> image/png, or JSON {"mask": base64 PNG};
                               $PGSEG_TOKEN is sent as Bearer token

exit status
  0  passed, or undecided (the interval holds the limit: add images)
  1  a gate failed or an alarm rang; the reasons are printed
  2  bad input

in CI (store the baseline once and commit it, then gate every change)
  pgseg robustness --model my_package.serve:segment --images tests/tiles --bank our_bank.yaml \\
      --per-level 0 --save baseline.json
  pgseg robustness --model my_package.serve:segment --images tests/tiles --bank our_bank.yaml --per-level 0 \\
      --against baseline.json --max-drop 0.02 --max-spread 0.05 --junit robustness.xml --html robustness.html

  # .github/workflows/robustness.yml
  on: [pull_request]
  jobs:
    robustness:
      runs-on: ubuntu-latest
      steps:
        - uses: actions/checkout@v4
        - uses: actions/setup-python@v5
          with: {python-version: "3.12"}
        - run: pip install -r requirements.txt    # pgseg_lite and what your model needs
        - run: >
            pgseg robustness --model my_package.serve:segment --images tests/tiles --bank our_bank.yaml --per-level 0
            --against baseline.json --max-drop 0.02 --junit robustness.xml --html robustness.html
        - uses: actions/upload-artifact@v4
          if: always()
          with: {name: robustness, path: robustness.*}

example
  pgseg robustness --model lite --dataset synthetic --size 12 --per-level 3 --html robustness.html
"""


def add_robustness_options(parser):
    """All but the options of data, bank and device, which other commands have too and which come first."""
    of_datasets = ("dataset", "root", "split", "fraction", "data_seed", "size", "shift", "annotations", "hub")
    parser.set_defaults(of_datasets={name: parser.get_default(name) for name in of_datasets})
    parser.epilog, parser.formatter_class = EPILOG, type("Raw", (parser.formatter_class,), {"_fill_text": keep_lines})
    parser.add_argument("--model", default="lite", help="which model, see below")
    parser.add_argument("--checkpoint", help="of a segmenter of this package: a bundled one, a folder, or a hub name")
    add_option_of_model(parser)
    parser.add_argument("--model-version", default="", help="name this state of a model that cannot be looked into")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one answer (not of lite, sam3, ...)")
    parser.add_argument("--retries", type=int, default=3, help="of a request to an endpoint")
    parser.add_argument("--workers", type=int, default=4, help="commands or requests at a time")
    parser.add_argument("--images", type=Path, help="a folder of images without masks, not --dataset; see --tile")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS, help="quality levels to ask in")
    parser.add_argument("--phrasings", choices=("all", "heldout", "train"), default="all", help="which of the bank's")
    parser.add_argument(
        "--per-level", type=int, default=10, help="phrasings a target and level, drawn alike each time; 0: all"
    )
    parser.add_argument("--folder", type=Path, help="keep answers here: after a kill, the same command goes on")
    gates = parser.add_argument_group("gates")
    gates.add_argument(
        "--save", type=Path, help="store a baseline (of six images or more) in this JSON file, unless --against fails"
    )
    gates.add_argument("--against", type=Path, help="compare with this baseline")
    gates.add_argument(
        "--max-drop",
        type=float,
        default=0.02,
        help="what Dice, agreement, distance of foils may lose, false area gain",
    )
    gates.add_argument("--max-spread", type=float, help="largest spread (sd of Dice over phrasings) of any group")
    gates.add_argument("--max-failures", type=int, default=0, help="items that may fail (default: 0)")
    reports = parser.add_argument_group("reports")
    for kind, text in (("json", "every figure"), ("junit", "JUnit XML for CI"), ("html", "a page with pictures")):
        reports.add_argument(f"--{kind}", type=Path, help=f"{text}, in this file")


def keep_lines(self, text, width, indent):
    return "\n".join(indent + line for line in text.splitlines())


def run_robustness(args, read_data):
    """`read_data(args)` opens the dataset that the shared options describe."""
    outputs = {kind: path for kind in ("save", "json", "junit", "html") if (path := getattr(args, kind))}
    for kind, path in outputs.items():
        check_file(path, f"--{kind}")
    if args.images and (given := [name for name, usual in args.of_datasets.items() if getattr(args, name) != usual]):
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SettingsError(f"--images measures a whole folder and takes no {listed}; leave it out, or use --dataset")
    bank = PromptBank.load(args.bank)
    from ..data.dataset import source_of
    from . import adapters, baseline, gates, measurement, report  # torch, from here on

    before = baseline.load_baseline(args.against) if args.against else None
    limits = args.max_drop, args.max_spread, args.max_failures
    data = measurement.open_pictures(args.images, args.tile or None) if args.images else read_data(args)
    gates.check_before(data, before, *limits)
    how = {name: getattr(args, name) for name in ("timeout", "retries", "workers")} | {"version": args.model_version}
    with options_of_model(args) as options:
        model = adapters.adapt(args.model, args.checkpoint, args.device, **how, **options)
    split = None if args.phrasings == "all" else args.phrasings
    result = measurement.measure(model, data, bank, args.levels, args.per_level or None, split, args.folder)
    if result.kept:
        print(f"{result.kept} of {result.asked} answers are from earlier calls, kept in {args.folder}", file=sys.stderr)
    found = report.Report(result, gates.check_gates(result, before, *limits))
    if args.save and before and not found.passed:  # or the same command would pass the next time
        print(f"{args.save}: not written, since a gate failed; call without --against to store it", file=sys.stderr)
    elif args.save:
        baseline.save_baseline(result, args.save)
        if (count := len({*map(source_of, result.keys)})) < gates.FEWEST:
            print(f"{args.save}: holds {count} images, and --against needs {gates.FEWEST}; add some", file=sys.stderr)
    for kind in ("json", "junit", "html"):
        if path := outputs.get(kind):
            baseline.write(path, getattr(found, kind)())
    print(found.text())
    return 0 if found.passed else 1


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
    if args.output:
        check_file(args.output, "the table")
    bank = PromptBank.load(args.bank)
    table = perturb(bank, args.kinds, args.severity, args.seed, bank.select(args.target))
    if not args.output:
        print(table.to_csv(index=False), end="")
        return
    write_text(args.output, table.to_csv(index=False))
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
