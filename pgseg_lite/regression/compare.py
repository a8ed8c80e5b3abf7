"""Do the group terms help here? Two short fine-tunings on one's own images and bank, without them and with them.

Both see the same images, phrasings, budget, seeds and starting model; they are tested on images held out by source and
on phrasings that neither has heard. A run lives in FOLDER/NAME-SEED: one whose records are there is finished, a killed
one goes on from its last checkpoint, and more seeds only add runs.
"""

import copy
import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from .. import tables
from ..data.dataset import source_of
from ..errors import BankError, DataError, Diverged, SettingsError, TrainingError
from ..experiments import FOUR, FULL, HELD_OUT, LEARNERS, SEG
from ..models import load_segmenter
from ..models.identity import answering, fingerprint
from ..runner import give_back_memory
from ..training import GroupDataset, train
from .adapters import adapt
from .answers import image_key
from .baseline import versions, write
from .checks import FAIL
from .collapse import heard
from .gates import FEWEST
from .measurement import chosen, measure

METHODS = {"baseline": SEG, "group": FULL}  # the name of a run's folder -> its method
SETTINGS = LEARNERS["lite"].settings["lite"]
SEEDS = 3  # with fewer no verdict: the sign of one or two differences is too easily a chance
SHOWN = {
    "dice": "Dice",
    "lowest": "lowest Dice",
    "sd": "spread",
    "agreement": "agreement",
    "false_area": "false area",
}
# Better agreement alone is no reason to keep anything: it can be bought by not listening.
DECIDE = {"better": ("dice", "lowest", "sd"), "worse": ("dice", "lowest", "sd", "false_area")}


@dataclass
class Comparison:
    """`table`: a row per target ("categories": their mean) and measure, with and without the terms, and the difference.

    `heard`: a row per run, the target-swap test. `failed`: runs that diverged. `folder` holds every trained model.
    """

    about: dict
    table: pd.DataFrame
    heard: pd.DataFrame  # method, seed, outcome, reason, estimate
    failed: dict  # "method, seed n" -> what it said
    folder: Path

    @property
    def advice(self):
        """One sentence: keep the terms, leave them out, a trade, or undecided."""
        deaf = self.heard[self.heard["outcome"] == FAIL]
        counts = [int((deaf["method"] == method).sum()) for method in (SEG, FULL)]
        held, seeds, steps = (self.about[name] for name in ("held_out_images", "seeds", "steps"))
        if counts[0]:
            said = f"even without the terms the model is deaf to words in {counts[0]} of {seeds} runs"
            return f"neither: {said}; train longer, or mend the bank"
        if counts[1]:
            return f"leave the terms out: with them the model is deaf to words in {counts[1]} of {seeds} runs"
        if held < FEWEST or seeds < SEEDS:
            few = f"{held} held-out images and {seeds} seeds are too few for a verdict"
            return f"undecided: {few}; use at least {FEWEST} and {SEEDS}"
        found = {verdict: self.decided(verdict) for verdict in DECIDE}
        better, worse = found["better"], found["worse"]
        if better and worse:
            return f"a trade that you must weigh: the terms make {better} better and {worse} worse{self.price()}"
        if worse:
            return f"leave the terms out: they make {worse} worse, and nothing that counts is shown to be better"
        if better:
            price = self.price()
            if price:
                return f"a trade that you must weigh: the terms make {better} better{price}"
            return f"keep the terms: they make {better} better, and nothing is shown to be worse"
        return f"undecided: nothing is shown; train longer than {steps} steps, or hold out more than {held} images"

    def price(self):
        """A clause where the target-swap test falls by half or more on every seed: not deaf, but on the way there."""
        heard = self.heard.pivot(index="seed", columns="method", values="estimate").dropna()
        if not len(heard) or not (heard[FULL] < heard[SEG] / 2).all():
            return ""
        before, after = heard[SEG].mean(), heard[FULL].mean()
        return f", and the model listens less: the target-swap test falls from {before:.2f} to {after:.2f}"

    def decided(self, verdict):
        rows = self.table[(self.table["verdict"] == verdict) & self.table["measure"].isin(DECIDE[verdict])]
        rows = rows[rows["decides"]]
        return " and ".join(f"the {SHOWN[row.measure]} of {row.target}" for row in rows.itertuples())

    def text(self):
        """For a terminal: the table, the target-swap test, what diverged, and the advice as the last line."""
        about, wide = self.about, max(map(len, [*self.table["target"], "target"]))
        lines = [
            f"{about['model']}, {about['steps']} steps, {about['seeds']} seeds, {about['training_images']} images of "
            f"{about['dataset']}; tested on {about['held_out_images']} others, in phrasings that training has not seen",
            f"without: {SEG}; with: {FULL}", "",
            f"{'target':<{wide}}  {'':<15}{'without':>8}{'with':>8}  {'difference (95 %)':<26}verdict",
        ]  # fmt: skip
        for row in self.table.itertuples():
            difference = f"{row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f})"
            both = f"{row.without:>8.3f}{row.with_terms:>8.3f}"
            lines.append(f"{row.target:<{wide}}  {SHOWN[row.measure]:<15}{both}  {difference:<26}{row.verdict}")
        lines.append("")
        hearing = self.heard.groupby("method", sort=False)["estimate"].mean()
        if hearing.notna().any():
            said = ", ".join(f"{value:.2f} {name}" for name, value in zip(("without", "with"), hearing, strict=True))
            lines.append(f"target-swap test: masks of one target overlap more than masks of two, by {said} (IoU)")
        else:
            lines.append(f"target-swap test: {self.heard['reason'].iloc[0]}")
        lines += [f"left out: {run}: {said}" for run, said in self.failed.items()]
        return "\n".join([*lines, self.advice])

    def json(self):
        rows = {name: json.loads(part.to_json(orient="records")) for name, part in
                (("table", self.table), ("heard", self.heard))}  # fmt: skip
        content = {"advice": self.advice, "about": self.about, "versions": versions(), **rows, "failed": self.failed}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def compare(data, bank, folder, settings=SETTINGS, *, start=None, seeds=SEEDS, held_out=HELD_OUT,
            per_level=10, quiet=False, report=print):  # fmt: skip
    """Train and test every run that `folder` lacks; writes compare.json and compare.csv there.

    start: a function that gives the model to fine-tune, the same each time; by default the bundled `fixed` one.
    held_out: the share of the source images that is tested on. per_level: phrasings asked, a target and level.
    """
    start, folder = start or bundled, Path(folder)
    data, rest, held = divide(data, bank, settings, seeds, held_out, per_level)
    model = start()
    name_of_model, setup = model.name, describe(data, bank, settings, model, held_out, per_level, quiet)
    del model
    claim(folder, setup)
    images, swaps, failed, spent = [], [], {}, []
    grid = [(seed, name) for seed in range(seeds) for name in METHODS]
    for done, (seed, name) in enumerate(grid, 1):
        method, home, began = METHODS[name], folder / f"{name}-{seed}", time.perf_counter()
        run, said = f"{method}, seed {seed}", "was there"
        if not (home / "records.csv").exists():
            give_back_memory()  # what the run before this one held
            try:
                execute(home, start(), rest, held, bank, replace(settings, seed=seed, **FOUR[method]), per_level, quiet)
            except Diverged as error:  # an outcome
                failed[run] = str(error)
            spent.append(time.perf_counter() - began)
            left = (len(grid) - done) * sum(spent) / len(spent)
            said = f"{'diverged' if run in failed else 'done'} in {spent[-1]:.0f} s; about {left:.0f} s to go"
        report(f"[{done}/{len(grid)}] {run}: {said}")
        if run not in failed:
            images.append(read_images(home).assign(method=method, seed=seed))
            swaps.append(dict(method=method, seed=seed) | json.loads((home / "heard.json").read_text()))
    finished = [(row["seed"], row["method"]) for row in swaps]
    pairs = sum(all((seed, method) in finished for method in METHODS.values()) for seed in range(seeds))
    if not pairs:
        raise TrainingError(f"{folder}: no seed has both runs, since others diverged: {next(iter(failed.values()))}")
    about = dict(
        model=name_of_model, dataset=data.name, bank=bank.name, steps=settings.steps, seeds=pairs,
        training_images=len(sources(rest)), held_out_images=len(sources(held)), setup=setup,
    )  # fmt: skip
    enough = about["held_out_images"] >= FEWEST and pairs >= SEEDS
    table = side_by_side(pd.concat(images), data.targets, enough)
    found = Comparison(about, table, pd.DataFrame(swaps), failed, folder)
    write(folder / "compare.json", found.json())
    write(folder / "compare.csv", found.table.to_csv(index=False))
    return found


def divide(data, bank, settings, seeds, held_out, per_level):
    """The data with the targets that the bank has words for, and its two parts; what would fail later fails here."""
    if seeds < 1:
        raise SettingsError(f"seeds is {seeds}; give at least 1, and {SEEDS} for a verdict")
    if len(sources(data)) < 2:
        raise DataError(
            f"{data.name} has one source image; a comparison trains on some and tests on others: add images"
        )
    data, has = copy.copy(data), data.targets
    data.targets = tuple(target for target in has if target in bank.targets)
    if not data.targets:
        said = f"the dataset has {', '.join(has)} and the bank {', '.join(bank.targets)}"
        raise BankError(f"bank {bank.name!r} and dataset {data.name!r} share no target: {said}; rename the bank's")
    rest, held = data.hold_out(held_out)
    GroupDataset(rest, bank, settings, 1)
    chosen(bank, held, settings.levels, per_level, "heldout")
    return data, rest, held


def sources(data):
    return {source_of(name) for name in data.ids}  # tiles `source@y,x` of one image count once


def read_images(home):
    text = dict.fromkeys(("image", "target", "phrasing"), str)  # an image may be called 17, a target None
    records = pd.read_csv(home / "records.csv", keep_default_na=False, na_values=[""], dtype=text)
    return tables.by_image(records)


def bundled():
    return load_segmenter("lite", "fixed")


def describe(data, bank, settings, model, held_out, per_level, quiet):
    """What must be equal for runs to stand side by side. Of the images it is the pixels and masks, not their names."""
    content = hashlib.sha256()
    for sample in tqdm(data, desc="reading", unit="image", disable=quiet):
        content.update(image_key(sample.image).encode())
        for target in data.targets:
            content.update(sample.masks[target].tobytes())
    words = hashlib.sha256(f"{bank.digest} {bank.foils}".encode())
    differs = {"seed", "group", "consistency"}  # between the runs
    return {
        "data": f"{data.name} {data.digest} {content.hexdigest()[:12]}",
        "targets": list(data.targets),
        "bank": f"{bank.name} {words.hexdigest()[:12]}",
        "start": fingerprint(model),
        **answering(model),
        "held_out": held_out,
        "per_level": per_level,
        **{name: value for name, value in asdict(settings).items() if name not in differs},
        "levels": list(settings.levels),
    }


def claim(folder, setup):
    """Make the folder this comparison's, or find that it is."""
    record = folder / "setup.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stored = json.loads(record.read_text()) if record.exists() else setup
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder}: no folder for the runs ({error}); give another") from error
    for name, now in setup.items():
        if stored.get(name) != now:
            said = f"{name} was {stored.get(name)} and is now {now}"
            raise SettingsError(f"{folder} holds another comparison: {said}; use the same, or another folder")
    write(record, json.dumps(setup, indent=1) + "\n")


def execute(home, model, rest, held, bank, settings, per_level, quiet):
    """Train one run and test it. records.csv is written last: a folder that has it is finished."""
    device = model.device.type if hasattr(model, "device") else None
    resume = (home / "run.json").exists()
    result = train(rest, bank, home, settings, model=model, resume=resume, device=device, quiet=quiet)
    measured = measure(adapt(result.model), held, bank, settings.levels, per_level, "heldout", quiet=quiet)
    check = heard(measured)
    said = {name: getattr(check, name) for name in ("outcome", "reason", "estimate")}
    write(home / "heard.json", json.dumps(said))  # NaN where the bank has one target
    write(home / "records.csv", measured.records.query("split != 'foils'").to_csv(index=False))
    for checkpoint in home.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def side_by_side(images, targets, enough):
    """The comparison as the reader gets it. The advice looks at "all" and "categories", or else at every target."""
    images = images.assign(test="held out")
    split = "all" in targets and len(targets) > 2
    parts = {target: images[images["target"] == target].assign(target="all") for target in targets}
    rows = [row | {"target": target, "decides": not split or target == "all"}
            for target, part in parts.items() for row in rows_of(part, "T1")]  # fmt: skip
    if split:
        rows += [row | {"target": "categories", "decides": True} for row in rows_of(images, "T2")]
    table = pd.DataFrame(rows)
    if not enough:
        table["verdict"] = "undecided"
    order = list(dict.fromkeys(("all", "categories", *targets)))
    return table.sort_values("target", key=lambda names: names.map(order.index), kind="stable", ignore_index=True)


def rows_of(images, task):
    found = tables.compare(images, SEG).query("method == @FULL and task == @task").set_index("measure")
    for name in (name for name in SHOWN if name in found.index):
        row = found.loc[name]
        yield dict(
            target="", measure=name, without=row["value"] - row["difference"], with_terms=row["value"],
            difference=row["difference"], low=row["difference_low"], high=row["difference_high"],
            verdict=row["verdict"], seeds_agree=bool(row["seeds_agree"]),
        )  # fmt: skip
