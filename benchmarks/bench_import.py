"""What importing the module costs beside importing torch, in fresh interpreters, taken in turns."""

import statistics
import subprocess
import sys
import time

ROUNDS = 7


def seconds(statement):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main():
    timed = {statement: [] for statement in ("pass", "import pgseg_lite", "import torch")}
    for _ in range(ROUNDS):
        for statement, times in timed.items():
            times.append(seconds(statement))
    empty, module, torch = (statistics.median(times) for times in timed.values())
    print(f"import torch {torch - empty:.3f} s, import pgseg_lite {module - empty:.3f} s: ", end="")
    print(f"{(module - empty) / (torch - empty):.1%} of it")


if __name__ == "__main__":
    main()
