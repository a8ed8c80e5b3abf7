"""`pgseg robustness` beside the same through one whole pass per phrasing, in one run.

    python benchmarks/bench_robustness.py [--images 200]

Both ask lite about every image in 30 phrasings of each of 5 targets and end with the same table, which is compared. The
shared way encodes an image once and keeps every answer; the other calls the model once per image and phrasing. By
default 4 images, and the other way's time for one of them stands for all, since it is the same each time.
"""

import argparse
import time
from dataclasses import replace
from tempfile import TemporaryDirectory

import pandas as pd
import torch

import pgseg_lite as pg
from pgseg_lite.regression import Report, adapt, check_gates, dispersion, measure


def timed(call):
    """The result, wall seconds and CPU seconds: on a busy machine only the latter compare."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--slow-images", type=int, default=1, help="asked in the slow way too; at most --images")
    parser.add_argument("--targets", type=int, default=5)
    parser.add_argument("--phrasings", type=int, default=30, help="a target, a third at each level")
    options = parser.parse_args()

    data = pg.load_dataset("synthetic", split="test", size=options.images, tile=None)
    data.targets = data.targets[: options.targets]
    bank = replace(pg.PromptBank.load("nuclei"), foils=())
    model = pg.load_segmenter("lite")

    def one_by_one(image, phrasing):
        return model.predict(image, phrasing).masks[0, 0].numpy()

    def run(adapted, samples):
        with TemporaryDirectory() as folder:
            result = measure(adapted, samples, bank, per_level=options.phrasings // 3, folder=folder, quiet=True)
        Report(result, check_gates(result)).json()
        return result

    few = pg.load_dataset("synthetic", split="test", size=options.images, tile=None)
    few.targets, few.ids = data.targets, data.ids[: options.slow_images]
    model.predict(data[0].image, "nuclei")  # warm-up: weights and sentence vectors
    shared, fast, fast_cpu = timed(lambda: run(adapt(model), data))
    slow_result, slow, slow_cpu = timed(lambda: run(adapt(one_by_one), few))
    again = measure(adapt(model), few, bank, per_level=options.phrasings // 3, quiet=True)
    pd.testing.assert_frame_equal(dispersion(again), dispersion(slow_result), atol=2e-3, rtol=0)

    times = len(data) / len(few)
    print(
        f"{len(data)} images x {len(data.targets)} targets x {options.phrasings} phrasings = {shared.asked} masks, "
        f"{torch.get_num_threads()} threads"
    )
    measured = "" if len(few) == len(data) else f", from {slow:.1f} s for {len(few)}"
    print(f"  image encoded once     {fast:8.1f} s ({fast_cpu:.1f} s CPU)")
    print(f"  a pass per phrasing    {slow * times:8.1f} s ({slow_cpu * times:.1f} s CPU){measured}")
    print(f"  {slow * times / fast:.1f} times faster ({slow_cpu * times / fast_cpu:.1f} in CPU time), same table")


if __name__ == "__main__":
    main()
