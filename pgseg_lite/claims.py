"""What the book's prose says of its own measurements: each figure read off a stored table, and none typed.

results/claims.yaml names them, by chapter. A chapter calls `tell(chapter)` once and writes {glue:text}`name` where a
figure belongs; the claims page lists them all, and a test recomputes what the pages show.
"""

from functools import cache

import numpy as np
import pandas as pd
import yaml

from .errors import ResultError
from .results import find_result, load_result
from .tables import compare, cube, tasks

FIELDS = ("says", "result", "where", "show", "tolerance")


def load():
    """Every claim by name: its chapter, what it says, its result, reference, where, column, show and tolerance."""
    path = find_result("claims.yaml")
    entries = {}
    for chapter, listed in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        shared = listed.pop("shared", {})  # what all claims of this chapter have in common
        for name, claim in listed.items():
            entry = {"chapter": chapter, "column": "value"} | shared | claim
            entry |= {"where": shared.get("where", {}) | claim.get("where", {})}
            if missing := [field for field in FIELDS if not entry.get(field) and entry.get(field) != 0]:
                raise ResultError(f"{path}: claim {name} lacks {', '.join(missing)}; add what is missing")
            entries[name] = entry
    return entries


@cache
def compared(result, reference):
    """The stored table's comparison with a reference method, Dice and its kin in percent."""
    return in_percent(compare(load_result(result), reference))


def in_percent(table):
    """Everything that a comparison holds but the effect size, times 100."""
    columns = ["value", "low", "high", "difference", "difference_low", "difference_high"]
    return table.assign(**{column: 100 * table[column] for column in columns})


def value(claim):
    """What the stored table says: the `column` of the one row that `where` picks."""
    table = compared(claim["result"], claim["reference"]) if "reference" in claim else load_result(claim["result"])
    where = {"measure": "dice", "level": "any"} | claim["where"] if "reference" in claim else claim["where"]
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    if len(table) != 1:
        raise ResultError(f"{claim['result']}: {len(table)} rows fit {where}; a claim needs exactly one")
    return table[claim["column"]].iloc[0]


def bounds(claim):
    """Floor and ceiling of the tolerance of a mean or a difference, in the unit of the figure.

    Floor: the standard deviation between the figure and its like from as many other seeds. Ceiling: half the width of
    its 95 % interval.
    """
    difference = claim["column"] == "difference"
    where = {"measure": "dice", "level": "any"} | claim["where"]
    methods = [where.pop("method")] + [claim["reference"]] * difference
    measure, task = where.pop("measure"), where.pop("task")
    rows = load_result(claim["result"])
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    sides = [cube(rows[rows["method"] == method], measure) for method in methods]
    by_seed = [tasks(sums.sum(1), counts.sum(1))[task] for sums, counts in sides]
    seeds = 100 * np.subtract.reduce(by_seed)  # a value a seed; of one side alone, that side
    ends = (f"difference_{end}" if difference else end for end in ("low", "high"))
    low, high = (value(claim | {"column": end}) for end in ends)
    return float(seeds.std(ddof=1) * np.sqrt(2 / len(seeds))), float((high - low) / 2)


def table(chapter=None):
    """The claims of a chapter, or of all, as the claims page shows them."""
    rows = [
        {"claim": name, "chapter": c["chapter"], "says": c["says"], "shown": c["show"].format(value(c)),
         "tolerance": c["tolerance"], "record": f"results/{c['result']}.csv"}
        for name, c in load().items() if chapter in (None, c["chapter"])
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["claim", "chapter", "says", "shown", "tolerance", "record"])


def tell(chapter):
    """Hand the chapter's figures to its prose: {glue:text}`name` prints what the stored table gives."""
    from IPython.display import display

    shown = table(chapter)
    for row in shown.itertuples():
        record = {"application/papermill.record/text/plain": repr(row.shown)}  # unquoted, "+1.0" would lose its sign
        about = {"scrapbook": {"name": row.claim, "mime_prefix": "application/papermill.record/"}}
        display(record, metadata=about, raw=True)
    print(f"{len(shown)} figures of this chapter's prose come from {', '.join(sorted(set(shown['record'])))}")
