"""What fine-tuning SAM3 on a tenth of PanNuke is expected to need on each card, computed from its FLOPs and shapes.

Nothing is measured. The table and its stamp go to results/.
"""

import time

from pgseg_lite.models import cost
from pgseg_lite.results import save_result, stamp


def main():
    started, table = time.perf_counter(), cost.table()
    settings = {
        "kind": "computed", "utilisation": cost.UTILISATION, "steps": cost.PAPER_STEPS, "image_tflop": cost.IMAGE,
        "phrasing_tflop": cost.PHRASING, "phrasings": cost.STEP_PHRASINGS, "test_phrasings": cost.TEST_PHRASINGS,
    }  # fmt: skip
    record = stamp(
        profile="full", datasets=[], seeds=[], settings=settings, wall_s=round(time.perf_counter() - started)
    )
    print(table.to_string(index=False))
    print(save_result("sam3_cost", table, record))


if __name__ == "__main__":
    main()
