"""How many 256 px tiles of synthetic tissue one core paints in a second; 20 or more is the aim.

OMP_NUM_THREADS=1 python benchmarks/bench_synthetic.py [--tiles 100] [--all-shifts]
"""

import argparse
import time

from pgseg_lite.data.shifts import SHIFTS
from pgseg_lite.data.synthetic import paint

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=100)
    parser.add_argument("--all-shifts", action="store_true", help="each shift too, not just the plain tissue")
    args = parser.parse_args()
    paint(0)  # warm up
    for shift in [None, *(SHIFTS if args.all_shifts else [])]:
        wall, cpu = time.perf_counter(), time.process_time()
        for seed in range(args.tiles):
            paint(seed, shift=shift)
        by_clock = args.tiles / (time.perf_counter() - wall)
        by_cpu = args.tiles / (time.process_time() - cpu)  # what the core could do with nobody else on it
        print(f"{shift or 'plain':<20} {by_clock:6.1f} tiles/s by the clock {by_cpu:6.1f} by CPU time")
