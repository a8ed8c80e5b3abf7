"""Tables of the book: means by image against the records they come from, and comparisons whose truth is known."""

import numpy as np
import pandas as pd
import pytest

import pgseg_lite as pg
from pgseg_lite import book, tables
from pgseg_lite.errors import ResultError
from pgseg_lite.experiments import FULL
from pgseg_lite.prompts import LEVELS
from pgseg_lite.results import save_result, stamp
from pgseg_lite.tables import MEASURES, by_image, by_phrasing, compare, scores, worst_phrasings


@pytest.fixture(scope="module")
def records():
    data = pg.load_dataset("synthetic", split="test", size=3, tile=128)
    return pg.evaluate(pg.load_segmenter("lite", "group", "cpu"), data, pg.PromptBank.load(), per_level=3, quiet=True)


def test_by_image_holds_what_robustness_holds(records):
    table = by_image(records)
    stated = pg.robustness(records, by=("target",)).set_index("target")
    for target, part in table.groupby("target"):
        for ours, theirs in (("dice", "mean"), ("sd", "sd"), ("agreement", "agreement"), ("flips", "flips")):
            assert np.average(part[ours].fillna(0), weights=part["tiles"]) == pytest.approx(
                stated.loc[target, theirs], abs=2e-5
            )
        if part["absent"].sum():
            area = np.average(part["false_area"].fillna(0), weights=part["absent"])
            assert area == pytest.approx(stated.loc[target, "false_area"], abs=0.02)  # it weighs images, not tiles


def test_levels_are_told_apart_on_request(records):
    table = by_image(records, by_level=True)
    assert list(table["level"].unique()) == ["any", *pg.prompts.LEVELS]
    pooled = table[table["level"] == "any"].set_index(["image", "target"])["dice"]
    levels = table[table["level"] != "any"].groupby(["image", "target"])["dice"].mean()
    pd.testing.assert_series_equal(levels.sort_index(), pooled.sort_index(), atol=3e-5)


def test_by_phrasing_holds_each_phrasings_mean(records):
    table = by_phrasing(records)
    row = table[table["target"] == "all"].iloc[4]
    asked = records[(records["target"] == "all") & (records["phrasing"] == row["phrasing"])]
    assert row["dice"] == pytest.approx(asked["dice"].mean(), abs=1e-5)


def test_the_worst_phrasing_is_named(records):
    table = by_phrasing(records).assign(method="one", seed=0, test="here")
    low = table[(table["target"] == "all") & (table["level"] == "low")]
    found = worst_phrasings(table).query("target == 'all' and level == 'low'")
    assert list(found["phrasing"]) == [low.loc[low["dice"].idxmin(), "phrasing"]]


def simulated(effect, noise=0.02, images=14, seeds=3, rng=0):
    """by_image rows of two methods whose Dice differs by `effect`, with noise between seeds and images."""
    rng, rows = np.random.default_rng(rng), []
    level = {(i, t): rng.uniform(0.5, 0.9) for i in range(images) for t in ("all", "a", "b")}
    for method, gain in (("old", 0.0), ("new", effect)):
        for seed in range(seeds):
            drift = rng.normal(0, noise / 2)
            for (i, target), base in level.items():
                dice = base + gain + drift + rng.normal(0, noise)
                rows.append(dict(method=method, seed=seed, test="t", level="any", split="heldout", target=target, image=f"i{i}",
                                 dice=dice, sd=0.1, lowest=dice - 0.1, agreement=0.8, flips=0.1, false_area=np.nan,
                                 tiles=16, absent=0))  # fmt: skip
    return pd.DataFrame(rows)


def test_an_agreement_that_nobody_knows_is_no_agreement_of_zero():
    alone = simulated(0.1).assign(agreement=np.nan)  # one phrasing a target
    assert scores(alone).query("measure == 'agreement'")["value"].isna().all()
    assert not len(compare(alone, "old").query("measure == 'agreement'"))
    half = simulated(0.1)
    half.loc[half["image"] == "i0", "agreement"] = np.nan
    assert np.allclose(scores(half).query("measure == 'agreement'")["value"], 0.8)


def dice_row(table, task="T1", method="new"):
    return table.query("method == @method and measure == 'dice' and task == @task").iloc[0]


def test_a_clear_difference_is_decided_and_has_its_size():
    for effect, verdict in ((0.1, "better"), (-0.1, "worse")):
        for task in ("T1", "T2"):
            row = dice_row(compare(simulated(effect), "old"), task)
            assert row["verdict"] == verdict and row["seeds_agree"]
            assert row["difference_low"] < effect < row["difference_high"]
            assert row["difference"] == pytest.approx(effect, abs=0.04) and abs(row["effect"]) > 2


def test_no_difference_is_seldom_decided():
    verdicts = [dice_row(compare(simulated(0.0, rng=rng), "old", resamples=300))["verdict"] for rng in range(30)]
    assert verdicts.count("undecided") >= 25


def test_a_method_beside_itself_differs_by_nothing():
    row = dice_row(compare(simulated(0.1), "old"), method="old")
    assert row["difference"] == row["difference_low"] == row["difference_high"] == 0 and row["verdict"] == "undecided"


def test_pairing_removes_what_images_have_in_common():
    """Images differ a lot, methods little: the difference is known far better than either value."""
    row = dice_row(compare(simulated(0.05, noise=0.005), "old"))
    assert row["difference_high"] - row["difference_low"] < 0.25 * (row["high"] - row["low"])


def test_one_seed_that_disagrees_leaves_it_undecided():
    table = simulated(0.0, noise=0.001)
    gain = table["seed"].map({0: 0.30, 1: 0.30, 2: -0.001})
    table["dice"] += gain.where(table["method"] == "new", 0)
    row = dice_row(compare(table, "old"))
    assert not row["seeds_agree"] and row["verdict"] == "undecided"


def test_only_seeds_that_both_have_are_compared():
    table = simulated(0.1)
    table = table[~((table["method"] == "new") & (table["seed"] == 2))]  # its third seed diverged
    assert dice_row(compare(table, "old"))["seeds"] == 2


def test_less_spread_is_better_and_a_foil_with_less_dice_too():
    table = simulated(0.0)
    table.loc[table["method"] == "new", "sd"] = 0.02 + 0.0001 * np.arange(len(table) // 2)
    found = compare(table, "old").query("method == 'new' and measure == 'sd'")
    assert set(found["verdict"]) == {"better"}
    foils = compare(simulated(-0.1).assign(split="foils"), "old")
    assert set(foils["measure"]) == {"dice"} and dice_row(foils)["verdict"] == "better"


def test_a_category_that_an_image_lacks_does_not_count():
    table = simulated(0.1)
    lacking = (table["target"] == "a") & table["image"].isin(["i0", "i1"])
    table.loc[lacking, ["tiles", "absent"]] = 0, 16
    table.loc[lacking, [name for name in MEASURES if name != "false_area"]] = np.nan
    table.loc[lacking, "false_area"] = 0.01
    row = dice_row(compare(table, "old"), "T2")
    kept = table[~lacking & (table["method"] == "new")]
    means = kept.groupby("target")["dice"].mean()
    assert row["value"] == pytest.approx((means["a"] + means["b"]) / 2)


def test_scores_keep_the_seeds_apart():
    table = simulated(0.1)
    found = scores(table).query("measure == 'dice' and method == 'new' and task == 'T1'")
    wanted = table.query("method == 'new' and target == 'all'").groupby("seed")["dice"].mean()
    assert list(found["value"]) == pytest.approx(list(wanted))


def test_an_unknown_reference_is_refused_with_the_methods_there_are():
    with pytest.raises(ResultError, match="no method 'baseline' here; choose one of old, new"):
        compare(simulated(0.1), "baseline")


# ---- the `full` columns of the chapters ----


def store_full(name, tests, methods, root):
    """A made-up full run: a row per test, method, seed, level, target and image."""
    rows = [
        dict(method=m, seed=s, test=t, dataset="d", split="heldout", level=lv, target=target, image=f"i{i}",
             dice=0.5 + 0.1 * s + 0.01 * n, sd=0.1, lowest=0.4, agreement=0.9, flips=0.0, false_area=np.nan,
             tiles=1, absent=0)
        for t in tests for n, m in enumerate(methods) for s in range(2)
        for lv in ("any", *LEVELS) for target in ("all", "dead") for i in range(2)
    ]  # fmt: skip
    record = stamp(profile="full", datasets=[], seeds=[0, 1], settings={}, wall_s=1.0)
    save_result(f"{name}_full", pd.DataFrame(rows), record, root)


def test_a_full_column_appears_beside_the_others_once_it_was_measured(tmp_path, capsys):
    side = pd.DataFrame({"T1": ["70", "80"]}, index=["full method", "the paper's"])
    by = dict(index="method", columns="task", test="CoNSeP", level="any", root=tmp_path)
    assert tables.with_full(side, "table1", "baselines", **by) is side
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "`pgseg experiment table1 --profile full`" in said[0]
    store_full("table1", ["CoNSeP", "validation"], ["full method"], tmp_path)
    store_full("baselines", ["CoNSeP"], ["full method no more", "clipseg"], tmp_path)
    full = tables.with_full(side, "table1", "baselines", **by)
    assert capsys.readouterr().out == ""
    assert list(full.index) == ["full method", "the paper's", "full method no more", "clipseg"]
    assert full["full: T1"].tolist()[0] == 55.0 and np.isnan(full["full: T1"].iloc[1])
    assert full.loc["clipseg", ["full: T1", "full: T2"]].tolist() == [56.0, 56.0]


CHAPTERS = {
    "08_reproduce_table_1": ("table1", ["CoNSeP", "PanNuke"], [FULL], "full: PanNuke T2"),
    "09_reproduce_table_2": ("table2", ["CoNSeP"], ["K=4"], "full: T2"),
    "10_reproduce_table_4": ("table4", ["unseen"], [FULL], "full: medium"),
    "11_reproduce_table_5": ("table5", ["CPM17"], [FULL], f"full: {FULL}"),
}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_shows_the_full_columns_that_lie_beside_its_table(chapter, repo, tmp_path, monkeypatch, capsys):
    name, tests, methods, column = CHAPTERS[chapter]
    store_full(name, tests, methods, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    cells = [cell.source for cell in book.read(repo / "notebooks" / f"{chapter}.md").cells if cell.cell_type == "code"]
    last = next(n for n, source in enumerate(cells) if "tables.with_full(" in source)
    space = {}
    for source in cells[: last + 1]:
        capsys.readouterr()
        exec(source, space)
    said = capsys.readouterr().out
    assert column in said and f"experiment {name} " not in said and "55.0" in said
