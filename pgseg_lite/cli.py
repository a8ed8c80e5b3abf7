"""`pgseg`: the module from the command line. Exit status 0, or 2 with one sentence on what went wrong."""

import argparse
import sys
from pathlib import Path

from . import __version__
from .errors import PgsegError, SettingsError
from .experiments import LEARNERS, named, result_name
from .files import whole, write_text
from .options import (
    add_bank_and_device,
    add_data_options,
    add_model_options,
    add_settings,
    check_file,
    check_folder,
    count,
    read_data,
    read_segmenter,
    read_settings,
    say,
)
from .prompts import LEVELS, PromptBank
from .regression.commands import (
    ABOUT_COMPARE,
    ABOUT_ROBUSTNESS,
    add_compare_options,
    add_prompt_commands,
    add_robustness_options,
    run_compare,
    run_robustness,
)
from .settings import PER_LEVEL, PROFILES, TRAINABLE
from .studies import STUDIES, refuse_options, run_study


def main(arguments=None):
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except PgsegError as error:
        print(f"pgseg: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # what no check could foresee, such as a disk that fills up
        said = f"{error.filename}: {error.strerror}; see that it can be read and written" if error.filename else error
        print(f"pgseg: {said}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing it here would take seconds
            raise
        print("pgseg: the GPU's memory is too small; cut the images smaller, or use --device cpu", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pgseg: stopped", file=sys.stderr)
        return 130


def build_parser():
    parser = argparse.ArgumentParser(prog="pgseg", description=__doc__)
    parser.add_argument("--version", action="version", version=f"pgseg_lite {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = command(commands, run_train, "train", "train a segmenter on prompt groups")
    add_data_options(train, split="train")
    add_model_options(train)
    train.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and its record")
    # Not --start: torchrun has two options that begin so, and refuses a third even behind the module's name.
    train.add_argument("--start-from", help="checkpoint; by default new weights for lite, the published for others")
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --output")
    train.add_argument("--profile", choices=PROFILES, default="lite", help="the settings to begin with")
    add_settings(train)

    scores = command(commands, run_evaluate, "evaluate", "score masks and how much they move with wording")
    add_data_options(scores, split="test")
    add_model_options(scores)
    scores.add_argument("--checkpoint", help="fixed or group (bundled, for lite), a folder, or a hub name")
    scores.add_argument("--levels", nargs="+", default=LEVELS, help="quality levels to ask in")
    scores.add_argument("--phrasings", choices=("heldout", "train"), default="heldout", help="unseen or seen ones")
    scores.add_argument("--profile", choices=PROFILES, default="lite", help=f"sets --per-level: {PER_LEVEL}")
    scores.add_argument("--per-level", type=int, help="phrasings a target and level; 0 for all")
    scores.add_argument("--records", type=Path, help="write the table of records to this CSV file")

    robust = command(commands, lambda args: run_robustness(args, read_data), "robustness", ABOUT_ROBUSTNESS)
    add_data_options(robust, split="test")
    add_bank_and_device(robust)
    add_robustness_options(robust)

    mended = command(commands, lambda args: run_compare(args, read_data, read_segmenter), "compare", ABOUT_COMPARE)
    add_data_options(mended, split="train")
    add_model_options(mended)
    add_compare_options(mended)

    experiment = command(commands, run_experiment, "experiment", "run a named grid of trainings and store its tables")
    experiment.add_argument("name", help=f"one of {', '.join([*named(), *STUDIES])}")
    experiment.add_argument("--profile", choices=PROFILES, default="lite", help="how long, how large, how many seeds")
    experiment.add_argument(
        "--segmenter", choices=LEARNERS, help="what is trained; by default lite, at full sam3 (a GPU, 3.4 GB a run)"
    )
    experiment.add_argument(
        "--start", action="append", metavar="CHECKPOINT",
        help="what every run starts from, a folder or a hub name; for baselines NAME=CHECKPOINT, a model to add",
    )  # fmt: skip
    experiment.add_argument(
        "--trainable", choices=TRAINABLE, help="what of sam3 is trained; at full by default full, else decoder"
    )
    experiment.add_argument("--jobs", type=count, help="runs at a time on this machine; by default one for each GPU")
    experiment.add_argument(
        "--scheduler", metavar="ADDRESS", help="send the runs to the workers of this Dask scheduler"
    )
    experiment.add_argument(
        "--folder",
        type=Path,
        default=Path("_build/experiments"),
        help="where runs are kept; what is there is not run again",
    )
    experiment.add_argument(
        "--output", type=Path, default=Path("results"),
        help="folder for the tables and their stamps: NAME.csv, with _PROFILE if that is not lite "
        "and _SEGMENTER if that is not the profile's own, so table1_full.csv",
    )  # fmt: skip

    prompts = group(commands, "prompts", "look at and check prompt banks")
    listing = command(prompts, run_prompts_list, "list", "count a bank's phrasings, or print those of one target")
    listing.add_argument("--target", help="print every phrasing of this target")
    lint = command(prompts, run_prompts_lint, "lint", "check a bank; exit status 1 when there are errors")
    lint.add_argument("--all", action="store_true", help="print every finding, not the first 5 of each kind")
    for parser_with_bank in (listing, lint):
        parser_with_bank.add_argument("bank", nargs="?", default="nuclei", help="a bundled bank, or the path of yours")

    add_prompt_commands(prompts, command)

    data = group(commands, "data", "look at and check datasets")
    command(data, run_data_list, "list", "the datasets that can be read, and their layouts")
    get = command(data, run_data_get, "get", "fetch a public dataset, or say how to get it, and check that it is whole")
    get.add_argument("name", help="pannuke, consep, cpm15, cpm17, kumar, cryonuseg or histology")
    get.add_argument("--root", help="where it is or shall be; by default its official name under $PGSEG_DATA")
    get.add_argument("--official", action="store_true", help="the official archives, not the hub's copy (pannuke only)")
    check = command(data, run_data_check, "check", "read every sample of a dataset and report what is in it")
    add_data_options(check, split="train")
    show = command(data, run_data_show, "show", "write a picture of the first samples with their masks")
    add_data_options(show, split="train")
    show.add_argument("--output", type=Path, default=Path("samples.png"), help="the PNG file to write")

    book = group(commands, "book", "execute, build and check the book (in a checkout)")
    execute = command(book, run_book_execute, "execute", "run the notebooks from the top with papermill")
    execute.add_argument("--profile", choices=PROFILES, default="lite", help="how long, how large")
    execute.add_argument("--jobs", type=count, default=1, help="notebooks at a time")
    execute.add_argument("--keep", action="store_true", help="store the outputs in notebooks/ (lite only)")
    execute.add_argument("--only", default="", help="only the notebooks whose name contains this")
    build = command(book, run_book_build, "build", "build the HTML, with warnings as errors")
    build.add_argument("--executed", type=Path, help="a folder of executed notebooks to show in place of the stored")
    command(book, run_book_check, "check", "check that notebooks and their text pairs say the same")
    address = command(book, run_book_address, "address", "say where on GitHub this book is: badges, buttons, bootstrap")
    address.add_argument("repository", metavar="OWNER/NAME", help="in place of the one before; outputs stay")
    handout = command(book, run_book_handout, "handout", "write copies for a class: no outputs and no solutions")
    handout.add_argument("folder", type=Path, help="where to; nothing that lies there is replaced")
    handout.add_argument("--only", default="", help="only the notebooks whose name contains this")
    command(book, run_book_sync, "sync", "make each .ipynb from its .md, keeping outputs of unchanged cells")
    return parser


def group(commands, name, text):
    return commands.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="ACTION")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def command(commands, run, name, text):
    parser = commands.add_parser(name, help=text, description=text, formatter_class=Help)
    parser.set_defaults(run=run)
    return parser


def run_train(args):
    from .training import train

    check_folder(args.output, "the checkpoint")
    settings, bank = read_settings(args), PromptBank.load(args.bank)
    model = read_segmenter(args, args.start_from) if args.start_from or args.segmenter != "lite" else None
    result = train(read_data(args), bank, args.output, settings, model=model, resume=args.resume, device=args.device)
    say(f"trained {settings.steps} steps in {result.wall_s:.0f} s ({result.cpu_s:.0f} CPU s): {result.folder}")


def run_evaluate(args):
    from .evaluation import evaluate, robustness

    if args.records:
        check_file(args.records, "the records")
    model, bank = read_segmenter(args, args.checkpoint), PromptBank.load(args.bank)
    per_level = PER_LEVEL[args.profile] if args.per_level is None else args.per_level
    records = evaluate(model, read_data(args), bank, args.levels, args.phrasings, per_level or None)
    if args.records:
        write_text(args.records, records.to_csv(index=False))
    table = robustness(records, by=("target",)).set_index("target")
    print(table[["mean", "sd", "range", "worst", "agreement", "flips", "false_area", "images"]].round(3).to_string())
    for target, row in table.dropna(subset="worst").iterrows():
        print(f"worst for {target}: {row['worst_phrasing']!r}, Dice {row['worst']:.3f}")


def run_experiment(args):
    check_folder(args.folder, "the runs")
    check_folder(args.output, "the tables")
    if args.name in STUDIES:
        return run_neighbour(args)
    if args.name not in (known := [*named(), *STUDIES]):
        raise SettingsError(f"there is no experiment {args.name!r}; choose one of {', '.join(known)}")
    from .results import save_result, stamp
    from .runner import run_experiment
    from .tables import scores

    options = dict(jobs=args.jobs, scheduler=args.scheduler, folder=args.folder)
    tables = run_experiment(args.name, args.profile, args.segmenter, args.start or (), args.trainable, **options)
    stem = result_name(args.name, args.profile, args.segmenter)
    for table, frame in tables.items():
        record = stamp(profile=args.profile, experiment=args.name, **frame.attrs["facts"])
        name = stem if table == "by_image" else f"{stem}_phrasings"
        print(save_result(name, frame, record, args.output))
    seen = scores(tables["by_image"]).query("measure == 'dice' and level == 'any'")
    print(
        (100 * seen.groupby(["test", "split", "method", "task"], sort=False)["value"].mean().unstack())
        .round(2)
        .to_string()
    )


def run_neighbour(args):
    from .results import save_result, stamp

    of_grids = ("segmenter", "start", "trainable", "jobs", "scheduler")
    refuse_options(args.name, {name: getattr(args, name) for name in of_grids})
    table = run_study(args.name, args.profile, args.folder)
    record = stamp(profile=args.profile, experiment=args.name, **table.attrs["facts"])
    print(save_result(result_name(args.name, args.profile, None), table, record, args.output))


def run_prompts_list(args):
    import pandas as pd

    bank = PromptBank.load(args.bank)
    if args.target:
        print("\n".join(f"{p.level:<7}{p.split:<8}{p.text}" for p in bank.select(args.target)))
        return
    counts = pd.DataFrame(bank.phrasings).groupby(["target", "level", "split"], sort=False).size().unstack()
    print(f"{bank.name} ({bank.digest}): {len(bank.phrasings)} phrasings\n{counts.fillna(0).astype(int).to_string()}")


def run_prompts_lint(args):
    from .lint import lint
    from .models.text import load_text_encoder

    findings = lint(PromptBank.load(args.bank), load_text_encoder())
    for (severity, check), part in findings.groupby(["severity", "check"], sort=False):
        print(f"{severity}: {check} ({len(part)})")
        for row in (part if args.all else part.head(5)).itertuples():
            print(f"  {row.target}: {row.phrasing!r}: {row.detail}")
    errors = int((findings["severity"] == "error").sum())
    print(f"{errors} errors, {len(findings) - errors} warnings")
    return 1 if errors else 0


def run_data_list(args):
    from .data import describe_datasets

    print(describe_datasets())


def run_data_get(args):
    from .data.download import get_dataset

    print(f"{args.name} is whole: {get_dataset(args.name, args.root, args.official)}")


def run_data_check(args):
    from tqdm import tqdm

    data = read_data(args)
    shares = {target: [] for target in data.targets}
    for sample in tqdm(data, desc="reading", unit="sample"):
        for target, mask in sample.masks.items():
            shares[target].append(mask.mean())
    print("target          present in  mean area where present")
    for target, values in shares.items():
        present = [value for value in values if value]
        area = f"{sum(present) / len(present):.1%}" if present else "-"
        print(f"{target:<15} {len(present):>4} of {len(values):<4} {area:>8}")


def run_data_show(args):
    from .plots import show_samples

    check_file(args.output, "the picture")
    if args.output.suffix != ".png":
        raise SettingsError(f"{args.output}: the picture is a PNG; give a name that ends in .png")
    data = read_data(args)
    figure = show_samples([data[i] for i in range(min(4, len(data)))], data.targets)
    with whole(args.output) as partial:
        figure.savefig(partial, dpi=120, format="png")
    print(args.output)


def chapters_here(part=""):
    """The chapters of this checkout that have `part` in their names."""
    from .book import chapters

    here = chapters()
    if not here:
        raise SettingsError("there is no notebooks/ here; run this in a checkout")
    if found := [path for path in here if part in path.name]:
        return found
    raise SettingsError(f"no notebook with {part!r} in its name in notebooks/; correct it")


def run_book_execute(args):
    from .book import execute

    execute(chapters_here(args.only), args.profile, jobs=args.jobs, keep=args.keep)


def run_book_handout(args):
    from .book import handout

    check_folder(args.folder, "the copies")
    print(*handout(chapters_here(args.only), args.folder), sep="\n")


def run_book_build(args):
    from .book import build, page_count

    chapters_here()
    html = build(executed=args.executed)
    print(f"{page_count(html)} pages, open {(html / 'index.html').as_uri()}")


def run_book_check(args):
    from .book import check_pairs

    problems = check_pairs(chapters_here())
    print("\n".join(problems) or "every notebook says what its .md says")
    return 1 if problems else 0


def run_book_address(args):
    from .book import give_address

    chapters_here()
    changed = give_address(args.repository)
    print("\n".join(map(str, changed)) or f"the book is at {args.repository} already")


def run_book_sync(args):
    from .book import sync

    for notebook in chapters_here():
        sync(notebook)
        print(notebook)


if __name__ == "__main__":
    sys.exit(main())
