"""The experiments of the neighbouring systems: cells x seeds, each measured once, kept under a hash and never repeated.

A study's package defines it in its `study.py`; nothing of the engine imports those packages.
"""

import json
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from .errors import SettingsError, TrainingError
from .experiments import SEEDS
from .files import write_text

STUDIES = {  # name -> the module that holds its STUDY
    "imprecise": "visual.study",
    "evolve": "evolve.study",
    "preferences": "preferences.study",
}


@dataclass(frozen=True)
class Study:
    """`measure(cell, seed, profile, folder)` gives a tidy table; its .attrs["datasets"] say what was measured on what.

    A cell is a dict of plain values. `folder` is shared by all cells, for models that several of them need: name what
    is kept there by everything that decides it.
    """

    about: str
    measure: object
    cells: dict  # label -> what this cell changes
    code: tuple  # the modules and packages of pgseg_lite whose code decides the outcome
    checkpoints: tuple = ()  # the bundled ones that it starts from or asks
    data: object = None  # profile -> the data sets that are read; None where its own code paints them
    seeds: dict = None  # profile -> seeds; those of all experiments by default


def find(name):
    return import_module(f".{STUDIES[name]}", __package__).STUDY


def run_study(name, profile="lite", folder="_build/experiments", report=print):
    """Measure what is missing of the named study; the table of all cells, its .attrs["facts"] ready for a stamp."""
    import pandas as pd

    from .keys import checkpoint_digest, code_digest, hash_of
    from .models import CHECKPOINTS
    from .results import EXACT

    study, folder = find(name), Path(folder).resolve() / name
    seeds = (study.seeds or SEEDS)[profile]
    decides = [checkpoint_digest(CHECKPOINTS / f"lite-{one}") for one in study.checkpoints]
    decides += [code_digest(study.code), *(data.digest for data in (study.data(profile) if study.data else ()))]
    grid = {hash_of([name, label, cell, seed, profile, *decides]): (label, cell, seed)
            for seed in seeds for label, cell in study.cells.items()}  # fmt: skip
    todo = [key for key in grid if not (folder / f"{key}.json").exists()]
    report(f"{name}: {len(grid)} cells, {len(grid) - len(todo)} of them measured before")
    folder.mkdir(parents=True, exist_ok=True)
    began, failures = time.perf_counter(), []
    for done, key in enumerate(todo, 1):
        (label, cell, seed), started, cpu = grid[key], time.perf_counter(), time.process_time()
        try:
            table = study.measure(cell, seed, profile, folder)
        except TrainingError as error:  # the others may still be measured
            failures.append(f"{label}, seed {seed}: {error}")
            report(f"[{done}/{len(todo)}] failed: {failures[-1]}")
            continue
        wall_s = time.perf_counter() - started
        write_text(folder / f"{key}.csv", table.to_csv(index=False))
        facts = dict(datasets=table.attrs["datasets"], wall_s=wall_s, cpu_s=time.process_time() - cpu)
        write_text(folder / f"{key}.json", json.dumps(facts))  # last: what has it is finished
        left = (len(todo) - done) * (time.perf_counter() - began) / done
        when = time.strftime("%H:%M", time.localtime(time.time() + left))
        report(f"[{done}/{len(todo)}] {label}, seed {seed}: {wall_s:.0f} s; the rest until about {when}")
    if failures:
        raise TrainingError(f"{name}: {len(failures)} of {len(grid)} cells failed; the first is {failures[0]}")
    kept = {key: json.loads((folder / f"{key}.json").read_text()) for key in grid}
    read = dict(keep_default_na=False, na_values=[""], **EXACT)
    parts = [pd.read_csv(folder / f"{key}.csv", **read).assign(cell=label, seed=seed)
             for key, (label, _, seed) in grid.items()]  # fmt: skip
    table = pd.concat(parts, ignore_index=True)
    table = table[["cell", "seed", *table.columns.drop(["cell", "seed"])]]
    datasets = {json.dumps(one, sort_keys=True): one for facts in kept.values() for one in facts["datasets"]}
    spent = {clock: round(sum(facts[clock] for facts in kept.values())) for clock in ("wall_s", "cpu_s")}
    table.attrs["facts"] = dict(datasets=[*datasets.values()], seeds=list(seeds), settings=study.cells, **spent)
    return table


def refuse_options(name, given):
    if unknown := [option for option, value in given.items() if value]:
        raise SettingsError(f"{name} has no {unknown[0]} to choose; leave --{unknown[0]} out")
