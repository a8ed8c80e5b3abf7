"""The commands of `pgseg prompts` about perturbed and collected phrasings."""

from pathlib import Path

from ..errors import SettingsError
from ..prompts import PromptBank


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
