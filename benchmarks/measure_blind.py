"""What T2 gives a mask that ignores the category: the true mask of all nuclei, for whatever is asked.

No model is trained. The table has the columns of `tables.by_image`, so that `tables.compare` can set it beside models.
Needs PGSEG_DATA. The table and its stamp go to results/.
"""

import time

import torch

import pgseg_lite as pg
from pgseg_lite.results import save_result, stamp
from pgseg_lite.tables import by_image


class Blind:
    """Answers every request with the true mask of all nuclei."""

    name = "blind"

    def __init__(self, data):
        self.truth = {sample.image.tobytes(): sample.masks["all"] for sample in data}

    def predict(self, image, prompts):
        mask = torch.from_numpy(self.truth[image.tobytes()])  # [H, W]
        logits = torch.where(mask, 10.0, -10.0).expand(1, len(prompts), -1, -1)
        presence = torch.full((1, len(prompts)), 10.0 if mask.any() else -10.0)
        return pg.SegmentationOutput(logits, presence)


def main():
    started, bank, data = time.perf_counter(), pg.PromptBank.load("nuclei"), pg.load_dataset("consep", split="test")
    table = by_image(pg.evaluate(Blind(data), data, bank, levels=("low",), per_level=1, quiet=True))
    record = stamp(
        profile="lite", datasets=[{"name": data.name, "split": data.split, "digest": data.digest}], seeds=[],
        settings={}, wall_s=round(time.perf_counter() - started), bank={"name": bank.name, "digest": bank.digest},
    )  # fmt: skip
    print(save_result("consep_blind", table, record))


if __name__ == "__main__":
    main()
