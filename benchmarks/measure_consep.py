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

STEPS, SEEDS, FRACTION = 1200, (0, 1, 2), 0.1
METHODS = {"prompt groups": ("group", {}), "one fixed phrasing": ("fixed", dict(wording="fixed", k=1))}
RUNS = Path("_build/consep")


def run(method, seed, bank, data, test):
    """Train and score one model. The records are written last, so a run that has them is finished."""
    folder = RUNS / f"{method.replace(' ', '-')}-{seed}"
    finished = folder / "result.json"
    if not finished.exists():
        settings = pg.TrainSettings(steps=STEPS, seed=seed, save_every=200)
        resume, (start, changes) = (folder / "run.json").exists(), METHODS[method]
        model = pg.load_segmenter("lite", start)
        result = pg.train(data, bank, folder, settings, model=model, resume=resume, **changes)
        records = pg.evaluate(result.model, test, bank).assign(segmenter=method)
        table = pg.robustness(records, by=("segmenter", "target")).assign(seed=seed)
        table.to_json(folder / "table.json", orient="records")
        finished.write_text(json.dumps({"wall_s": result.wall_s, "cpu_s": result.cpu_s, "resumed": resume}))
    return pd.read_json(folder / "table.json", orient="records"), json.loads(finished.read_text())


def main(methods):
    bank, tables, wall = pg.PromptBank.load("nuclei"), [], 0
    test = pg.load_dataset("consep", split="test")
    for method in methods:
        for seed in SEEDS:
            data = pg.load_dataset("consep", split="train", fraction=FRACTION, seed=seed)
            table, timing = run(method, seed, bank, data, test)
            tables.append(table.assign(train_digest=data.digest, cpu_minutes=timing["cpu_s"] / 60))
            wall += timing["wall_s"]
            scores = table.set_index("target")["mean"]
            print(f"{method}, seed {seed}: T1 {scores['all']:.4f}, T2 {scores.drop('all').mean():.4f}, ", end="")
            print(f"{timing['cpu_s'] / 60:.1f} CPU minutes", flush=True)
    settings = asdict(pg.TrainSettings(steps=STEPS)) | {
        "fraction": FRACTION,
        "methods": {m: METHODS[m] for m in methods},
    }
    record = stamp(
        profile="lite",
        datasets=[{"name": "consep", "split": "test", "digest": test.digest}],
        seeds=list(SEEDS),
        settings=json.loads(json.dumps(settings)),
        wall_s=round(wall),
        bank={"name": bank.name, "digest": bank.digest},
    )
    print(save_result("consep_lite", pd.concat(tables, ignore_index=True), record))


if __name__ == "__main__":
    main(sys.argv[1:] or list(METHODS))
