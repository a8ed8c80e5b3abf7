"""Dice of many masks: packed bits beside torchmetrics, in one run on one thread.

    python benchmarks/bench_dice.py

Packing both sides is part of the time (an evaluation packs the true mask once for all phrasings). Every way
sees the same masks and must give the same figures. torchmetrics is called in three common ways.
"""

import argparse
import time

import numpy as np
import torch
from torchmetrics.functional.segmentation import dice_score
from torchmetrics.segmentation import DiceScore

from pgseg_lite import metrics


def best_of(call, repeats):
    """The result and the shortest of several wall times: the least disturbed one."""
    times = []
    for _ in range(repeats + 1):  # the first is the warm-up
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, min(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)  # numpy's bit operations have no threads to set

    shape = (options.masks, options.size, options.size)  # [M, H, W]
    generator = np.random.default_rng(0)
    predicted, true = generator.random(shape) < 0.3, generator.random(shape) < 0.3
    predicted_t, true_t = (torch.from_numpy(masks)[:, None] for masks in (predicted, true))  # [M, 1, H, W]
    one_class = {"num_classes": 1, "input_format": "one-hot"}

    def packed():
        return metrics.dice(metrics.pack(predicted), metrics.pack(true))  # [M]

    def pairs():
        return zip(predicted_t.split(1), true_t.split(1), strict=True)  # [1, 1, H, W] each

    def batched():
        return dice_score(predicted_t, true_t, **one_class).numpy()

    def function_per_mask():
        return np.array([dice_score(p, t, **one_class).item() for p, t in pairs()])

    def metric_per_mask():
        metric = DiceScore(**one_class)
        return np.array([metric(p, t).item() for p, t in pairs()])

    rows = {}
    for name, call, repeats in (
        ("pgseg_lite, packed bits", packed, options.repeats),
        ("torchmetrics, one batch", batched, options.repeats),
        ("torchmetrics, function per mask", function_per_mask, options.repeats),
        ("torchmetrics, metric object per mask", metric_per_mask, 1),
    ):
        rows[name] = best_of(call, repeats)

    reference, base = rows["pgseg_lite, packed bits"]
    print(f"Dice of {options.masks} masks, {options.size} x {options.size} px, one thread, best time")
    for name, (values, seconds) in rows.items():
        gap = np.abs(values - reference).max()
        assert gap < 1e-7, f"{name} differs by {gap}"
        print(f"{name:38s}{1000 * seconds:10.1f} ms{seconds / base:8.1f} x   largest difference {gap:.0e}")


if __name__ == "__main__":
    main()
