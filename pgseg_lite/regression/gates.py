"""Does this measurement pass? Decided by intervals over images, paired with a baseline where there is one.

The rule. A gate fails when the whole interval lies beyond its limit: the upper end of the change below -max_drop, or
the lower end of the spread above max_spread. It passes when the whole interval lies on the good side, and is undecided,
which does not fail, when the limit is inside. So a failure is something shown, not something not ruled out, and more
images make the gate sharper in both directions.

The intervals of all targets and levels hold together with 95 % probability (`summary.simultaneous`): of twenty or
thirty that hold one at a time, a model that only jitters would soon fail one by chance. An unchanged model has its
change at zero, and the limit away from it. A drop on one level alone is compared on that level, where it is not
diluted. Pairing takes out what images differ in, so that a few of them show a drop of a few hundredths.
"""

from dataclasses import replace

import numpy as np

from ..data.dataset import source_of
from ..errors import ResultError, SettingsError
from .answers import image_key
from .baseline import ITEM
from .checks import FAIL, PASS, UNDECIDED, Check
from .collapse import alarms
from .summary import by_image, simultaneous, sources

FEWEST = 6  # source images: with fewer, not even unanimous ones reach 2.5 % on either side (1 / 2 ** 6)
GATES = {"fit": "drop", "agreement": "agreement", "separation": "foils moved", "false_area": "false area"}
WORDS = {"fit": "Dice", "agreement": "agreement", "separation": "the distance of foils", "false_area": "the false area"}


def check_gates(result, baseline=None, max_drop=0.02, max_spread=None, max_failures=0):
    """A Check per question: alarms, failed items, and per target and level what the limits and the baseline ask."""
    check_limits(max_drop, max_spread, max_failures)
    checks = [answers(result, max_failures), *alarms(result)]
    if baseline is not None:
        checks = [known(check, baseline) for check in checks]
        checks += against(result, baseline, max_drop)
    if max_spread is not None:
        checks += spread(result, max_spread)
    return checks


def check_before(data, baseline=None, max_drop=0.02, max_spread=None, max_failures=0):
    """What `check_gates` would refuse afterwards, as far as it is known before a model is asked."""
    check_limits(max_drop, max_spread, max_failures)
    if baseline is not None:
        known, common = set(baseline.keys.values()), set()
        for sample in data:
            if image_key(sample.image) in known:
                common.add(source_of(sample.id))
            if len(common) == FEWEST:  # enough is known: the rest need not be read twice
                break
        check_alike(baseline, bool(data.targets), len(common))
        check_enough(baseline.path, len(common))


def check_limits(max_drop, max_spread, max_failures):
    for name, limit in (("max_drop", max_drop), ("max_spread", max_spread), ("max_failures", max_failures)):
        if limit is not None and not 0 <= limit < np.inf:
            raise SettingsError(f"{name} is {limit}; give a number of at least 0")


def check_alike(baseline, truth, common):
    """Whether there is anything to compare. common: how many images are in both."""
    if truth != baseline.about["truth"]:
        there, here = ("with true masks" if known else "without masks" for known in (not truth, truth))
        raise ResultError(f"{baseline.path}: measured {there}, this run {here}; measure both alike")
    if not common:
        raise ResultError(f"{baseline.path}: none of its images is in this run; measure the images of the baseline")


def check_enough(who, count):
    if count < FEWEST:
        raise ResultError(f"{who}: a gate needs at least {FEWEST} images in common, and there are {count}; add images")


def answers(result, max_failures):
    count = len(result.failures)
    said = f"{count} of {result.asked} items failed"
    if count:
        first = result.failures.iloc[0]
        said += f", such as {first['phrasing']!r} on {first['image']}: {first['reason']}"
    return Check("answers", "all targets", "", FAIL if count > max_failures else PASS, said, count, limit=max_failures)


def known(check, baseline):
    """An alarm that rang at the baseline too, for the same phrasings, is no regression; deafness is never accepted."""
    rang = baseline.alarms.get((check.gate, check.target, check.level))
    if check.outcome != FAIL or check.gate not in ("foils", "misplaced") or rang is None:
        return check
    if new := [text for text in check.phrasings if text not in rang]:
        return replace(check, reason=f"{check.reason}; not so in the baseline: {', '.join(map(repr, new))}")
    return replace(check, outcome=UNDECIDED, reason=f"{check.reason} (as in the baseline)")


def against(result, baseline, max_drop):
    """What changed since the baseline, on the items of both."""
    new, old, same_items = paired(result, baseline)
    yield restriction(new, result, baseline, same_items)
    if not same_items:
        yield from moved(result, baseline)
    change = by_image(new, result.fit) - by_image(old, result.fit)
    # The majority mask and agreement are those of a group: with other phrasings in it they are other quantities.
    comparable = ["fit", "false_area"] + ["agreement", "separation"] * same_items
    change = change[[column for column in change if column[0] in comparable]]
    for (measure, target, level), estimate, low, high in intervals(change, baseline.path):
        what = f"{WORDS[measure]} of {target} at level {level}".replace("at level foil", "from its phrasings")
        rises = measure == "false_area"  # where it gets worse
        worst, best, limit = (-high, -low, max_drop) if rises else (low, high, -max_drop)
        outcome, verb = PASS if worst >= -max_drop else UNDECIDED, "changed by"
        if best < -max_drop:
            outcome, verb = FAIL, "got worse, by"
        reason = f"{what} {verb} {estimate:+.3f} ({low:+.3f} to {high:+.3f}); the limit is {limit:+g}"
        if np.isnan(estimate):
            reason = f"{what} is known on fewer than {FEWEST} images in common"
        yield Check(GATES[measure], target, level, outcome, reason, estimate, low, high, limit)


def spread(result, max_spread):
    wide = by_image(result.records, result.fit)
    wide = wide[[column for column in wide if column[0] == "spread"]]
    for (_, target, level), estimate, low, high in intervals(wide, "max_spread"):
        outcome = FAIL if low > max_spread else PASS if high <= max_spread else UNDECIDED
        found = f"{estimate:.3f} ({low:.3f} to {high:.3f})"
        reason = f"the spread of Dice over the phrasings of {target} is {found}; the limit is {max_spread:g}"
        if np.isnan(estimate):
            reason = f"the spread of Dice over the phrasings of {target} is known on fewer than {FEWEST} images"
        yield Check("spread", target, level, outcome, reason, estimate, low, high, max_spread)


def intervals(wide, who):
    """(column, estimate, low, high); NaN for columns with too few images."""
    wide = wide.dropna(axis=1, how="all")
    enough = wide.loc[:, sources(wide) >= FEWEST]
    check_enough(who, max(sources(wide), default=0))
    yield from zip(enough, *simultaneous(enough), strict=True)
    yield from ((column, np.nan, np.nan, np.nan) for column in wide if column not in enough)


def paired(result, baseline):
    """The records of both on what is in both, row by row, and whether each target has the same phrasings in both."""
    items = ["key", *ITEM]
    new = result.records.assign(key=result.records["image"].map(result.keys)).drop_duplicates(items)
    old = baseline.records.assign(key=baseline.records["image"].map(baseline.keys)).drop_duplicates(items)
    check_alike(baseline, result.about["truth"], new["key"].isin([*baseline.keys.values()]).sum())
    same_items = set(zip(*new[ITEM].to_numpy().T, strict=True)) == set(zip(*old[ITEM].to_numpy().T, strict=True))
    new, old = new.set_index(items), old.set_index(items)
    common = new.index.intersection(old.index, sort=False)
    if not len(common) or not (same_items or result.about["truth"]):
        what = "no phrasing" if not len(common) else "other phrasings, and without masks only the same can be compared,"
        raise ResultError(
            f"{baseline.path}: has {what} of this run's bank; measure with the baseline's bank, or store anew"
        )
    new, old = new.loc[common].reset_index(), old.loc[common].reset_index()
    moved = (new["area_true"] - old["area_true"]).abs() > 1e-4
    if moved.any():
        raise ResultError(
            f"{baseline.path}: the true masks of {new['image'][moved.idxmax()]} have changed; store it anew"
        )
    return new, old.assign(image=new["image"]), same_items


def restriction(common, result, baseline, same_items):
    count = common["image"].nunique(), len(result.keys), len(baseline.keys)
    said = f"compared with {baseline.path.name} on {count[0]} images ({count[1]} here, {count[2]} there)"
    if not same_items:
        phrasings = common.drop_duplicates(ITEM)
        said += f" and {len(phrasings)} phrasings, since banks differ: agreement and foils are not compared"
    return Check("baseline", "all targets", "", PASS, said)


def moved(result, baseline):
    """Phrasings that stood under another target when the baseline was stored: then both are asked, and one is wrong."""
    here, there = (
        records[records["split"] != "foils"].drop_duplicates(["target", "phrasing"])
        for records in (result.records, baseline.records)
    )
    both = here.merge(there, on="phrasing", suffixes=("", "_old"))
    still = set(both[both["target"] == both["target_old"]]["phrasing"])
    both = both[~both["phrasing"].isin(still)]
    for (target, old, level), rows in both.groupby(["target", "target_old", "level"], sort=False):
        reason = (
            f"the bank has {len(rows)} phrasings under {target} that stood under {old} in the baseline, such as "
            f"{rows['phrasing'].iloc[0]!r}: a target is swapped, so move them back or store a new baseline"
        )
        yield Check("bank", target, level, FAIL, reason)
