"""Execute an experiment: only what is missing, over processes, GPUs or a cluster; then read its tables.

A run lives in FOLDER/KEY, a test of it in FOLDER/KEY/TEST.csv; both names are hashes of everything that decides
what is inside. So what is there is finished and is skipped, and a killed run goes on from its last checkpoint.
"""

import gc
import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from .errors import DataError, Diverged, ModelError, SettingsError, TrainingError
from .evaluation import evaluate
from .experiments import BANK, find, runs
from .files import write_text
from .keys import run_key, test_key
from .prompts import PromptBank
from .settings import PER_LEVEL
from .tables import by_image, by_phrasing

# ---- one run ----


def execute(run, key, tests, folder, quiet=True):
    """Train one run unless it is there, then test it in every way that is missing. Returns its seconds.

    tests: the key of each test, the test, and how many phrasings a level.
    """
    from .models import load_segmenter

    started, home = time.perf_counter(), Path(folder) / key
    give_back_memory()  # what the run before this one held
    try:
        if run.settings and not (home / "finished.json").exists():
            train_run(run, home, quiet)
        if run.settings and json.loads((home / "finished.json").read_text())["failed"]:
            return time.perf_counter() - started
        missing = [one for one in tests if not (home / f"{one[0]}.csv").exists()]
        if missing:
            give_back_memory()
            model = load_segmenter(run.segmenter, home if run.settings else run.start, **run.options)
            home.mkdir(parents=True, exist_ok=True)
        for name, test, per_level in missing:
            records = evaluate(
                model, test.data.load(), PromptBank.load(BANK), test.levels, test.split, per_level, quiet
            )
            write_text(home / f"{name}.csv", records.to_csv(index=False))
    except torch.OutOfMemoryError as error:
        error.__traceback__ = None  # whoever keeps it would keep the model
        raise ModelError("the GPU's memory is too small to test this run; take a larger GPU") from error
    if not run.settings:
        write_outcome(home, wall_s=time.perf_counter() - started)
    return time.perf_counter() - started


def train_run(run, home, quiet):
    from .models import load_segmenter
    from .training import train

    started = time.perf_counter()
    model = load_segmenter(run.segmenter, run.start, **run.options)
    if run.text_dropout is not None:
        model.query_head.dropout.p = run.text_dropout
    options = dict(model=model, resume=(home / "run.json").exists(), quiet=quiet)
    try:
        result = train(run.data.load(), PromptBank.load(BANK), home, run.settings, **options)
        write_outcome(home, result.wall_s, result.cpu_s)
    except Diverged as error:  # an outcome: it would do so again
        write_outcome(home, time.perf_counter() - started, failed=str(error))
    for checkpoint in home.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def write_outcome(home, wall_s, cpu_s=0, failed=""):
    write_text(home / "finished.json", json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "failed": failed}))


def give_back_memory():
    """A trainer and its model refer to each other, so they stay until they are looked for."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# ---- many runs ----


def run_experiment(
    name, profile="lite", segmenter=None, starts=(), trainable=None, *, jobs=None, scheduler=None,
    folder="_build/experiments", report=print,
):  # fmt: skip
    """Execute what is missing of the named grid and return its tables: {"by_image": ..., "by_phrasing": ...}.

    `segmenter` is what is trained, by default lite and at full sam3; `starts` holds the checkpoint that all runs start
    from, or for baselines NAME=CHECKPOINT of each model to add. `jobs` processes share this machine, by default one
    for each GPU and one where there is none. `scheduler` is the address of a running Dask scheduler whose workers
    see the same folders.
    """
    experiment, folder = find(name), Path(folder).resolve()
    wanted = runs(experiment, profile, segmenter, starts, trainable)  # first: it refuses what makes no sense
    tests = available_tests(experiment, wanted, profile, report)
    grid, asked = {}, {}
    for run in wanted:
        per_level = run.per_level or PER_LEVEL[profile] or None
        mine = {label: test for label, test in tests.items() if run.trained in ("", test.trained)}
        if mine:
            grid[key := run_key(run)] = run
            asked[key] = {label: (test_key(test, per_level, run.segmenter), test, per_level)
                          for label, test in mine.items()}  # fmt: skip
    todo = {key: run for key, run in grid.items() if not is_finished(folder / key, asked[key].values())}
    failures, left_out, started = [], [], time.perf_counter()
    with workers(jobs, scheduler) as (pool, width):
        report(f"{name}: {len(grid)} runs, {len(grid) - len(todo)} of them finished before; {width} at a time")
        futures = {pool.submit(execute, run, key, [*asked[key].values()], str(folder), width > 1): key
                   for key, run in todo.items()}  # fmt: skip
        for done, future in enumerate(as_completed(futures), 1):
            key, elapsed = futures[future], time.perf_counter() - started
            run, left = grid[key], (len(todo) - done) * elapsed / done
            when = time.strftime("%H:%M", time.localtime(time.time() + left))
            try:
                said = f"{future.result():.0f} s"
            except BrokenProcessPool:
                said = "failed: a process was killed, as a rule for lack of memory; the same command goes on from here"
                failures.append(f"{run} {said}")
            except Exception as error:
                if isinstance(error, ModelError) and not run.settings:
                    said = f"left out: {error}"
                    left_out.append(key)
                else:
                    said = f"failed: {type(error).__name__}: {error}"
                    failures.append(f"{run} {said}")
            outlook = f"; the rest until about {when}" if done < len(todo) else ""
            report(f"[{len(grid) - len(todo) + done}/{len(grid)}] {run}: {said}{outlook}")
    if failures:
        raise TrainingError(f"{name}: {len(failures)} of {len(grid)} runs failed; the first is {failures[0]}")
    if len(left_out) == len(grid):
        raise ModelError(f"{name}: no model of it can be loaded here; what each lacks is said above")
    return read_tables(experiment, {key: run for key, run in grid.items() if key not in left_out}, asked, folder)


def available_tests(experiment, wanted, profile, report):
    """Those tests whose images are here, and the images that the models put to them are trained on."""
    trained, tests = {run.trained: run.data for run in wanted}, {}
    for label, test in experiment.tests.items():
        if test.trained not in trained and "" not in trained:
            continue  # this segmenter is not trained on that
        test = replace(test, data=test.data.at(profile))
        try:
            for data in filter(None, (test.data, trained.get(test.trained))):
                data.load()
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
    failed = json.loads((home / "finished.json").read_text())["failed"]
    return bool(failed) or all((home / f"{key}.csv").exists() for key, _, _ in tests)


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
    gpus = torch.cuda.device_count()
    jobs, context = jobs or max(1, gpus), get_context("spawn")
    turns = context.Queue()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")  # on a shared machine only these are ours
    names = given.split(",")[:gpus] if given else range(gpus)
    for turn in range(jobs):
        turns.put(names[turn % gpus] if gpus else None)
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))
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
    torch.set_num_threads(threads)


# ---- from runs to tables ----


def read_tables(experiment, grid, asked, folder):
    """The tables of all runs; their .attrs["facts"] say what was trained, on what, for how long, and what diverged."""
    images, phrasings, failed, wall, cpu = [], [], {}, 0, 0
    for key, run in grid.items():
        outcome = json.loads((folder / key / "finished.json").read_text())
        wall, cpu = wall + outcome["wall_s"], cpu + outcome["cpu_s"]
        if outcome["failed"]:
            failed[str(run)] = outcome["failed"]
            continue
        for label, (test, _, _) in asked[key].items():
            records = pd.read_csv(folder / key / f"{test}.csv", keep_default_na=False, na_values=[""])
            images.append(by_image(records, experiment.detail).assign(**run.about, test=label))
            if experiment.detail:
                phrasings.append(by_phrasing(records).assign(**run.about, test=label))
    if not images:
        raise TrainingError(f"every run diverged; the first: {next(iter(failed.values()))}")
    facts = dict(wall_s=round(wall), cpu_s=round(cpu), failed=failed, runs=list(grid), **what_was_done(grid, asked))
    tables = {"by_image": images, "by_phrasing": phrasings}
    return {name: with_facts(pd.concat(parts), facts) for name, parts in tables.items() if parts}


def what_was_done(grid, asked):
    """Of a grid's runs: data sets and their roles, seeds, settings of the first, where they start, the bank."""
    sets = {}
    for key, run in grid.items():
        if run.settings:
            sets[f"training {run.trained}"] = ("training", run.data, {"steps": run.settings.steps})
        sets |= {label: (label, test.data, {}) for label, (_, test, _) in asked[key].items()}
    loaded = [
        (role, data.load(), more) for role, data, more in sorted(sets.values(), key=lambda one: one[0] != "training")
    ]
    first = next(iter(grid.values()))
    settings = asdict(first.settings) if first.settings else {
        run.method: dict(segmenter=run.segmenter, checkpoint=public_name(run.start), **run.options)
        for run in grid.values()
    }  # fmt: skip
    return dict(
        datasets=[dict(name=d.name, split=d.split, digest=d.digest, role=role) | more for role, d, more in loaded],
        seeds=sorted({run.settings.seed for run in grid.values() if run.settings}),
        settings=json.loads(json.dumps(settings)), segmenter=first.segmenter if first.settings else None,
        start=public_name(first.start), bank={"name": BANK, "digest": PromptBank.load(BANK).digest},
    )  # fmt: skip


def public_name(checkpoint):
    """A stamp is public: of a folder only its name."""
    return Path(checkpoint).name if checkpoint and Path(checkpoint).exists() else checkpoint


def with_facts(table, facts):
    first = ["method", "seed", "test"]
    table = table[first + [column for column in table if column not in first]].reset_index(drop=True)
    table.attrs["facts"] = facts
    return table
