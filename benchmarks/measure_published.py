"""Ask nnInteractive or SAM-Med3D about real scans with bent masks, as `pgseg experiment imprecise` asks the small one.

    python benchmarks/measure_published.py nninteractive --scans RawData/Training --limit 5

Needs a GPU, the model's own package and nibabel. BTCV's scans come from synapse.org (syn3193805) after registration.
Writes results/imprecise_MODEL.csv and its stamp; `tidy` and `curves` of pgseg_lite.visual.curves read it.
"""

import argparse
import sys
import time
from pathlib import Path

from pgseg_lite.errors import PgsegError
from pgseg_lite.results import save_result, stamp
from pgseg_lite.visual.adapters import NnInteractive, SamMed3D
from pgseg_lite.visual.perturb import KINDS, SEVERITIES
from pgseg_lite.visual.phantoms import about
from pgseg_lite.visual.scans import load_scans
from pgseg_lite.visual.study import ask_bent

MODELS = {"nninteractive": NnInteractive, "sam-med3d": SamMed3D}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--scans", type=Path, required=True, help="a folder with img/ and label/, as BTCV's")
    parser.add_argument("--weights", help="the publisher's folder or file; by default the hub's")
    parser.add_argument("--limit", type=int, help="only the first so many scans")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    began = time.perf_counter()
    try:
        model = MODELS[options.model](options.weights)
        volumes = load_scans(options.scans, limit=options.limit)
    except PgsegError as error:
        sys.exit(str(error))
    table = ask_bent(model, volumes, SEVERITIES, {"mask": tuple(KINDS)}).assign(cell=model.name, seed=0)
    facts = dict(datasets=[about(volumes, "test") | {"name": options.scans.name}], seeds=[0], settings={})
    record = stamp(profile="full", model=model.name, wall_s=round(time.perf_counter() - began), **facts)
    print(save_result(f"imprecise_{options.model}", table, record, options.output))


if __name__ == "__main__":
    main()
