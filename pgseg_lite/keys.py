"""Names for runs and tests: hashes of everything that decides what comes out, so that nothing is made twice."""

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from .experiments import BANK, LEARNERS
from .prompts import PromptBank

# The code that decides what comes out; a comment or a docstring in it does not.
TRAINS = ("training", "losses", "augment", "prompts", "data")
TESTS = ("evaluation", "metrics", "colour", "prompts", "data")
DECIDE_NOTHING = {"access", "cost"}  # of models/: find weights, say what is in the way, estimate


@cache
def code_of(segmenter):
    """The modules of models/ that this segmenter is made of: its own and what that one imports, and so on."""
    from .models import SEGMENTERS

    folder, found = Path(__file__).parent / "models", set()
    waiting = {SEGMENTERS[segmenter].split(".")[0]} if segmenter in SEGMENTERS else set()
    while waiting:
        found.add(name := waiting.pop())
        tree = ast.parse((folder / f"{name}.py").read_text("utf-8"))
        near = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
        names = {node.module for node in near} | {alias.name for node in near for alias in node.names}
        waiting |= {name for name in names if name and (folder / f"{name}.py").exists()} - found - DECIDE_NOTHING
    return tuple(f"models/{name}" for name in sorted(found))


@cache
def code_digest(modules):
    """12 hex digits for what this code does: its syntax trees without docstrings."""
    package, trees = Path(__file__).parent, []
    for module in modules:
        path = package / module
        for file in sorted(path.glob("*.*")) if path.is_dir() else [path.with_suffix(".py")]:
            trees.append(
                without_docstrings(file.read_text("utf-8")) if file.suffix == ".py" else file.read_text("utf-8")
            )
    return hash_of(trees)


def without_docstrings(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    return ast.dump(tree)


def hash_of(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


@cache
def about_start(segmenter, start):
    """What a run's record says of the weights it starts from; they themselves are not kept in memory."""
    from .models import load_segmenter
    from .models.identity import fingerprint

    model = load_segmenter(segmenter, start, "cpu", **LEARNERS[segmenter].options)
    return {"start": fingerprint(model)} | getattr(model, "options", {})


def run_key(run):
    if not run.settings:
        return hash_of([run.segmenter, checkpoint_digest(run.start), run.options])
    from .training import HARDWARE, describe_run

    described = describe_run(run.data.load(), PromptBank.load(BANK), run.settings, 1, None)
    described |= about_start(run.segmenter, run.start)
    for name in HARDWARE:
        described.pop(name, None)
    return hash_of([described, run.options, run.text_dropout, code_digest(TRAINS + code_of(run.segmenter))])


def checkpoint_digest(checkpoint):
    """Of the files in a checkpoint's folder, or the name that it has elsewhere."""
    if checkpoint is None or not Path(checkpoint).is_dir():
        return checkpoint
    digests = {}
    for path in sorted(path for path in Path(checkpoint).rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digests[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hash_of(digests)


def test_key(test, per_level, segmenter):
    bank = PromptBank.load(BANK)
    asked = bank.foils if test.split == "foils" else bank.digest
    about = [test.data.load().digest, test.data.targets, test.split, test.levels, per_level, asked]
    return hash_of([*map(str, about), code_digest(TESTS + code_of(segmenter))])
