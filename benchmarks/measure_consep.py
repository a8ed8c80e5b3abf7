"""Measure `lite` on real tissue and store it: CoNSeP, 10 % of the training tiles, wording that no model has seen.

Two ways of training on the same images, three seeds each: one fixed phrasing per target, and the full method. Each
starts from the bundled checkpoint that was trained its way on synthetic tissue. A seed draws other tiles, views and
phrasings. The test tiles are read once, here; nothing was chosen by them. Needs PGSEG_DATA. Finished runs are kept in
_build/consep and skipped, a killed one resumes. The table and its stamp go to results/.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd

import pgseg_lite as pg
from pgseg_lite.results import save_result, stamp

STEPS, VIEW, SEEDS, FRACTION = 2000, 192, (0, 1, 2), 0.1
METHODS = {"prompt groups": ("group", {}), "one fixed phrasing": ("fixed", dict(wording="fixed", k=1))}
RUNS = Path("_build/consep")


def train(method, seed, bank, data):
    """The trained model and how long it took. timing.json is written last: a run that has it is finished."""
    folder = RUNS / f"{method.replace(' ', '-')}-{seed}"
    timing = folder / "timing.json"
    if not timing.exists():
        start, changes = METHODS[method]
        settings = pg.TrainSettings(steps=STEPS, view=VIEW, seed=seed, save_every=200)
        options = dict(model=pg.load_segmenter("lite", start), resume=(folder / "run.json").exists())
        result = pg.train(data, bank, folder, settings, **options, **changes)
        timing.write_text(json.dumps({"wall_s": result.wall_s, "cpu_s": result.cpu_s}))
    return pg.load_segmenter("lite", folder), json.loads(timing.read_text())


def main(methods):
    bank, tables, wall = pg.PromptBank.load("nuclei"), [], 0
    tests = {
        "256 px": pg.load_dataset("consep", split="test"),
        "whole": pg.load_dataset("consep", split="test", tile=None),
    }
    for method in methods:
        for seed in SEEDS:
            data = pg.load_dataset("consep", split="train", fraction=FRACTION, seed=seed)
            model, timing = train(method, seed, bank, data)
            wall += timing["wall_s"]
            for tiles, test in tests.items():
                records = pg.evaluate(model, test, bank).assign(segmenter=method)
                table = pg.robustness(records, by=("segmenter", "target"))
                facts = dict(seed=seed, tiles=tiles, train_digest=data.digest, cpu_minutes=timing["cpu_s"] / 60)
                tables.append(table.assign(**facts))
                scores = table.set_index("target")["mean"]
                print(f"{method}, seed {seed}, {tiles}: T1 {scores['all']:.4f}, T2 {scores.drop('all').mean():.4f}")
    settings = asdict(pg.TrainSettings(steps=STEPS, view=VIEW)) | {
        "fraction": FRACTION,
        "methods": {m: METHODS[m] for m in methods},
    }
    record = stamp(
        profile="lite",
        datasets=[
            {"name": test.name, "split": f"test, {tiles}", "digest": test.digest} for tiles, test in tests.items()
        ],
        seeds=list(SEEDS),
        settings=json.loads(json.dumps(settings)),
        wall_s=round(wall),
        bank={"name": bank.name, "digest": bank.digest},
    )
    print(save_result("consep_lite", pd.concat(tables, ignore_index=True), record))


if __name__ == "__main__":
    main(sys.argv[1:] or list(METHODS))
