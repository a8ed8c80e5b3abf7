"""Bent masks at the size of a CT volume, beside scipy.ndimage with the same cube, on one thread.

    python benchmarks/bench_visual.py

An organ fills a part of the volume, so the work can keep to the part around it; `whole` is a mask that touches all
sides, where it cannot. scipy's own quick ways are taken: a separable filter for maximum and minimum, not
binary_dilation, which visits each of the 17 ** 3 voxels of the cube.
"""

import argparse
import time

import numpy as np
from scipy import ndimage

from pgseg_lite.visual.perturb import perturb_mask


def ball(shape, share):
    """An ellipsoid whose axes are that share of the volume's."""
    axes = np.ogrid[tuple(slice(-1, 1, complex(0, size)) for size in shape)]
    return sum((axis / share) ** 2 for axis in axes) < 1


def best_of(call, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(100, 512, 512))
    parser.add_argument("--radius", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    size, shape = 2 * options.radius + 1, tuple(options.shape)
    masks = {"organ": ball(shape, 0.4), "whole": np.random.default_rng(0).random(shape) < 0.7}
    others = ~ball(shape, 0.42)
    scipys = {
        "dilate": lambda mask: ndimage.maximum_filter(mask, size, mode="nearest"),
        "erode": lambda mask: ndimage.minimum_filter(mask, size, mode="nearest"),
        "hole": lambda mask: mask & ~ndimage.minimum_filter(mask, size, mode="nearest"),
    }
    print(f"{' x '.join(map(str, shape))} voxels, radius {options.radius}, one thread, best of {options.repeats}")
    for name, mask in masks.items():
        for kind, scipy in scipys.items():
            theirs, reference = best_of(lambda: scipy(mask), options.repeats)  # noqa: B023
            ours, seconds = best_of(lambda: perturb_mask(mask, kind, options.radius), options.repeats)  # noqa: B023
            assert np.array_equal(ours, theirs), f"{kind} of the {name} is not scipy's"
            print(f"{name:6}{kind:15}{seconds:7.2f} s, scipy.ndimage {reference:6.2f} s: {seconds / reference:5.2f} x")
    for kind in ("shift", "mix", "jagged", "missing slices", "wrong slice", "thick slices", "leak"):
        mask = masks["organ"]
        _, seconds = best_of(lambda: perturb_mask(mask, kind, options.radius, others=others), 1)  # noqa: B023
        print(f"organ {kind:15}{seconds:7.2f} s")


if __name__ == "__main__":
    main()
