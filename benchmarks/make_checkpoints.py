"""Train the two small checkpoints that ship in the package: `make checkpoints`.

Same synthetic tissue, same network, same number of steps and images. `fixed` asks with one canonical phrasing
per target; `group` is the full method at the module's defaults. A killed run goes on where it stopped.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

import pgseg_lite as pg
from pgseg_lite.models import CHECKPOINTS
from pgseg_lite.results import stamp

COMMON = pg.TrainSettings(steps=1200, view=192, save_every=200)
WORDINGS = {"group": {}, "fixed": dict(wording="fixed", k=1)}
RUNS = Path("_build/checkpoints")


def main():
    data, bank, made = pg.load_dataset("synthetic", split="train", size=400), pg.PromptBank.load("nuclei"), {}
    for name, changes in WORDINGS.items():
        folder = RUNS / name
        result = pg.train(data, bank, folder, COMMON, resume=(folder / "run.json").exists(), **changes)
        settings = asdict(COMMON) | changes
        record = stamp(
            profile="lite",
            datasets=[{"name": data.name, "split": data.split, "digest": data.digest}],
            seeds=[COMMON.seed],
            settings={key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
            wall_s=round(result.wall_s),
            bank={"name": bank.name, "digest": bank.digest},
        )
        made[name] = (result, record)
    for name, (result, record) in made.items():  # last, or the stamps would find the checkout changed
        target = CHECKPOINTS / f"lite-{name}"
        shutil.rmtree(target, ignore_errors=True)
        result.model.save_pretrained(target, dtype=torch.float16)
        (target / "stamp.json").write_text(json.dumps(record, indent=2) + "\n")
        size = sum(path.stat().st_size for path in target.iterdir())
        print(f"{target}: {size / 1e6:.1f} MB, {result.cpu_s / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
