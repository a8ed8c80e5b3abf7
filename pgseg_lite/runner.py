"""Execute an experiment: only what is missing, over processes, GPUs or a cluster; then read its tables.

A run lives in FOLDER/KEY, a test of it in FOLDER/KEY/TEST.csv; both names are hashes of everything that decides
what is inside. So what is there is finished and is skipped, and a killed run goes on from its last checkpoint.
"""

import ast
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

from .errors import DataError, SettingsError, TrainingError
from .evaluation import evaluate
from .experiments import BANK, START, find, runs
from .prompts import PromptBank
from .settings import PER_LEVEL
from .tables import by_image, by_phrasing

# The code that decides what comes out; a comment or a docstring in it does not.
TRAINS = ("training", "losses", "augment", "prompts", "data", "models/lite", "models/text")
TESTS = ("evaluation", "metrics", "prompts", "data", "models/base", "models/lite", "models/text")

# ---- keys ----


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
def start_model():
    from .models import load_segmenter

    return load_segmenter("lite", START, "cpu")


def run_key(run):
    from .training import describe_run

    described = describe_run(run.data.load(), PromptBank.load(BANK), run.settings, 1, start_model())
    described.pop("save_every")  # decides how much a kill costs, not what comes out
    return hash_of([described, run.text_dropout, code_digest(TRAINS)])


def test_key(test, per_level):
    bank = PromptBank.load(BANK)
    asked = bank.foils if test.split == "foils" else bank.digest
    about = [test.data.load().digest, test.data.targets, test.split, test.levels, per_level, asked]
    return hash_of([*map(str, about), code_digest(TESTS)])


# ---- one run ----


def execute(run, key, tests, per_level, folder):
    """Train one run unless it is there, then test it in every way that is missing. Returns its seconds."""
    from .models import load_segmenter
    from .training import train

    started, home = time.perf_counter(), Path(folder) / key
    bank = PromptBank.load(BANK)
    if not (home / "finished.json").exists():
        model = load_segmenter("lite", START)
        if run.text_dropout is not None:
            model.query_head.dropout.p = run.text_dropout
        options = dict(model=model, resume=(home / "run.json").exists(), quiet=True)
        try:
            result = train(run.data.load(), bank, home, run.settings, **options)
            outcome = {"wall_s": result.wall_s, "cpu_s": result.cpu_s, "failed": ""}
        except TrainingError as error:  # a loss that diverges is an outcome: it would do so again
            outcome = {"wall_s": time.perf_counter() - started, "cpu_s": 0, "failed": str(error)}
        for checkpoint in home.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        write_text(home / "finished.json", json.dumps(outcome))
    if not json.loads((home / "finished.json").read_text())["failed"]:
        missing = {name: test for name, test in tests.items() if not (home / f"{name}.csv").exists()}
        model = load_segmenter("lite", home) if missing else None
        for name, test in missing.items():
            records = evaluate(model, test.data.load(), bank, test.levels, test.split, per_level, quiet=True)
            write_text(home / f"{name}.csv", records.to_csv(index=False))
    return time.perf_counter() - started


def write_text(path, text):
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text)
    partial.replace(path)


# ---- many runs ----


def run_experiment(name, profile="lite", *, jobs=None, scheduler=None, folder="_build/experiments", report=print):
    """Execute what is missing of the named grid and return its tables: {"by_image": ..., "by_phrasing": ...}.

    `jobs` processes share this machine, by default one for each GPU and one where there is none. `scheduler` is
    the address of a running Dask scheduler whose workers see the same folders.
    """
    experiment, per_level = find(name), PER_LEVEL[profile] or None
    tests = available_tests(experiment, profile, report)
    keys = {label: test_key(test, per_level) for label, test in tests.items()}
    grid = {run_key(run): run for run in runs(experiment, profile)}
    by_key = {keys[label]: test for label, test in tests.items()}
    todo = {key: run for key, run in grid.items() if not is_finished(Path(folder) / key, by_key)}
    failures, started = [], time.perf_counter()
    with workers(jobs, scheduler) as (pool, width):
        report(f"{name}: {len(grid)} runs, {len(grid) - len(todo)} of them finished before; {width} at a time")
        futures = {pool.submit(execute, run, key, by_key, per_level, str(Path(folder).resolve())): run
                   for key, run in todo.items()}  # fmt: skip
        for done, future in enumerate(as_completed(futures), 1):
            run, elapsed = futures[future], time.perf_counter() - started
            left = (len(todo) - done) * elapsed / done
            when = time.strftime("%H:%M", time.localtime(time.time() + left))
            try:
                said = f"{future.result():.0f} s"
            except Exception as error:
                said = f"failed: {type(error).__name__}: {error}"
                failures.append(f"{run.method}, seed {run.settings.seed} {said}")
            outlook = f"; the rest until about {when}" if done < len(todo) else ""
            report(
                f"[{len(grid) - len(todo) + done}/{len(grid)}] {run.method}, seed {run.settings.seed}: {said}{outlook}"
            )
    if failures:
        raise TrainingError(f"{name}: {len(failures)} of {len(grid)} runs failed; the first is {failures[0]}")
    return read_tables(experiment, grid, keys, tests, Path(folder))


def available_tests(experiment, profile, report):
    tests = {}
    for label, test in experiment.tests.items():
        test = replace(test, data=test.data.at(profile))
        try:
            test.data.load()
        except DataError as error:
            if not test.optional:
                raise
            report(f"{label} is left out: {error}")
        else:
            tests[label] = test
    return tests


def is_finished(home, tests):
    if not (home / "finished.json").exists():
        return False
    return bool(json.loads((home / "finished.json").read_text())["failed"]) or all(
        (home / f"{key}.csv").exists() for key in tests
    )


@contextmanager
def workers(jobs, scheduler):
    """An executor that runs are sent to, and how many go at a time: this machine's, or a Dask cluster's.

    Dask, because its client is one `pip install` away, hands out the same executor as the standard library does, and
    starts on laptops, over SSH, on Slurm and on Kubernetes by commands that are not ours to maintain.
    """
    if scheduler:
        with connect(scheduler) as client:
            yield client.get_executor(pure=False), sum(client.nthreads().values())
        return
    import torch

    gpus = torch.cuda.device_count()
    jobs, context = jobs or max(1, gpus), get_context("spawn")
    turns = context.Queue()
    for turn in range(jobs):
        turns.put(turn % gpus if gpus else None)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, context, initializer=take_place, initargs=(turns, threads))
    try:
        yield pool, jobs
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def connect(address, wait_s=10):
    try:
        from distributed import Client
    except ImportError as error:
        raise SettingsError("a scheduler needs Dask here too; run `pip install distributed`") from error
    try:
        return Client(address, timeout=wait_s)
    except (OSError, TimeoutError, ValueError) as error:
        said = f"no Dask scheduler answers at {address} ({type(error).__name__})"
        raise SettingsError(f"{said}; start one with `dask scheduler`, and workers with `dask worker`") from error


def take_place(turns, threads):
    """A worker's first act: its own GPU, if there are any, and its share of the cores."""
    gpu = turns.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    import torch

    torch.set_num_threads(threads)


# ---- from runs to tables ----


def read_tables(experiment, grid, keys, tests, folder):
    """The tables of all runs; their .attrs["facts"] say what was trained, on what, for how long, and what diverged."""
    images, phrasings, failed, wall, cpu = [], [], {}, 0, 0
    for key, run in grid.items():
        outcome = json.loads((folder / key / "finished.json").read_text())
        wall, cpu = wall + outcome["wall_s"], cpu + outcome["cpu_s"]
        about = dict(method=run.method, seed=run.settings.seed)
        if outcome["failed"]:
            failed[f"{run.method}, seed {run.settings.seed}"] = outcome["failed"]
            continue
        for label, test in keys.items():
            records = pd.read_csv(folder / key / f"{test}.csv", keep_default_na=False, na_values=[""])
            images.append(by_image(records, experiment.detail).assign(**about, test=label))
            if experiment.detail:
                phrasings.append(by_phrasing(records).assign(**about, test=label))
    if not images:
        raise TrainingError(f"every run diverged; the first: {next(iter(failed.values()))}")
    loaded = {label: test.data.load() for label, test in tests.items()}
    trained = next(iter(grid.values())).data.load()
    sets = [{"name": trained.name, "split": trained.split, "digest": trained.digest, "role": "training"}]
    sets += [dict(name=d.name, split=d.split, digest=d.digest, role=label) for label, d in loaded.items()]
    any_run = next(iter(grid.values()))
    facts = dict(
        datasets=sets, seeds=sorted({run.settings.seed for run in grid.values()}), wall_s=round(wall),
        settings=json.loads(json.dumps(asdict(any_run.settings))), cpu_s=round(cpu), failed=failed,
        start=START, bank={"name": BANK, "digest": PromptBank.load(BANK).digest}, runs=list(grid),
    )  # fmt: skip
    tables = {"by_image": images, "by_phrasing": phrasings}
    return {name: with_facts(pd.concat(parts), facts) for name, parts in tables.items() if parts}


def with_facts(table, facts):
    first = ["method", "seed", "test"]
    table = table[first + [column for column in table if column not in first]].reset_index(drop=True)
    table.attrs["facts"] = facts
    return table
