"""Alarms: agreement that says nothing because the model does not listen, and phrasings under the wrong target."""

from .checks import FAIL, PASS, UNDECIDED, Check
from .summary import asked_for, by_image, figure

# Of an overlap. Words that move masks by less are noise; a model that listens moves them by tenths.
HEARD = 0.05
# Of Dice: how much better a mask must fit another target before its phrasing is called misplaced.
MISPLACED = 0.1


def alarms(result):
    """A Check for each: does a mask follow the target that is asked for, does it move for foils, is each phrasing
    answered as its target? Perfect agreement is worth nothing where one of the first two fails."""
    return [heard(result), *foils_heard(result), *misplaced(result)]


def heard(result):
    """The target-swap test: on one image, masks of two targets must overlap less than masks of one target do."""
    within, between = overlaps(result)
    said = "no image shows two targets, or the bank has only one, so it cannot be known whether words are heard"
    if not len(between):
        return Check("deaf", "all targets", "", UNDECIDED, f"{said}; add targets or foils")
    values = figure("apart", (within - between).dropna())  # of the images that have both
    numbers = [values[name] for name in ("apart", "apart_low", "apart_high")]
    said = f"masks of one target overlap {within.mean():.2f}, masks of two targets {between.mean():.2f} (IoU)"
    if numbers[2] < HEARD:
        reason = f"the model is deaf to words: {said}, so its agreement was bought by deafness and is worth nothing"
        if within.mean() < 0.5:  # it listens, to everything but the target
            reason = f"the model does not follow the target: {said}, so wording moves its masks more than the target"
        return Check("deaf", "all targets", "", FAIL, reason, *numbers, HEARD)
    return Check("deaf", "all targets", "", PASS if numbers[1] > HEARD else UNDECIDED, said, *numbers, HEARD)


def overlaps(result):
    """Per image: mean IoU among phrasings of one target, and between the majorities of two. Empty masks say nothing."""
    records = asked_for(result)
    alone = records.assign(agreement=records["agreement"].fillna(1))  # one phrasing agrees with itself
    within = alone[alone["marked"]].groupby("image")["agreement"].mean()
    return within, result.pairs.groupby("image")["iou"].mean()


def foils_heard(result):
    """A check per target that has foils: they ask for something else, so their masks must lie further off."""
    wide = by_image(result.records, result.fit)
    for column in (column for column in wide if column[0] == "separation"):
        numbers = list(figure("apart", wide[column]).values())
        said = f"foils of {column[1]} lie {numbers[0]:.2f} further from its mask than its phrasings do (Dice)"
        outcome = PASS if numbers[1] > HEARD else UNDECIDED
        if numbers[2] < HEARD:
            outcome = FAIL
            said += ": the model answers texts that ask for something else with this target's mask"
        yield Check("foils", column[1], "", outcome, said, *numbers, HEARD)


def misplaced(result):
    """A check per (target, level) with phrasings whose masks fit another target better than their own."""
    records, found = asked_for(result), {}
    toward = records[[name for name in records if name.startswith("toward_")]]
    toward = toward.rename(columns=lambda name: name.removeprefix("toward_"))
    for (target, level, phrasing), rows in toward.groupby([records["target"], records["level"], records["phrasing"]]):
        own = rows.get(target, 0 * records["dice"].loc[rows.index])
        others = rows.drop(columns=target, errors="ignore")
        # An empty reference (the target is not there) is fitted by no mask.
        better = others.fillna(0).sub(own.fillna(0), axis=0).where(others.notna() | own.notna().to_numpy()[:, None])
        nearer = others.columns[better.mean() > MISPLACED]
        if len(nearer):
            other = others[nearer].mean().idxmax()  # where it is there: a part fits better than the whole it lies in
            numbers = list(figure("better", better[other].set_axis(records.loc[rows.index, "image"])).values())
            if numbers[1] > 0:
                found.setdefault((target, level, other), []).append((phrasing, numbers))
    for (target, level, other), phrasings in found.items():
        phrasing, numbers = max(phrasings, key=lambda item: item[1][0])
        reason = (
            f"{len(phrasings)} phrasings listed under {target} (level {level}) are answered with the mask of {other}, "
            f"such as {phrasing!r}: they stand under the wrong target of the bank, or the model takes one for the other"
        )
        texts = tuple(text for text, _ in phrasings)
        yield Check("misplaced", target, level, FAIL, reason, *numbers, MISPLACED, texts)
    if not found:
        yield Check("misplaced", "all targets", "", PASS, "every phrasing is answered as its own target or as none")
