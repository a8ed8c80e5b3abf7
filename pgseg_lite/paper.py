"""The paper's five tables as data, and the claims of its text recomputed from them (arXiv 2603.06384 v1)."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from .errors import ResultError


@cache
def _source():
    return yaml.safe_load(Path(__file__).with_name("paper_tables.yaml").read_text(encoding="utf-8"))


def table(n):
    """Table n, tidy: a row per printed figure, its title in .attrs; `gain` is the gain printed beside it."""
    if n not in _source()["tables"]:
        raise ResultError(f"the paper has no table {n!r}; ask for 1, 2, 3, 4 or 5")
    source, records = _source()["tables"][n], []
    for row in source["rows"]:
        names = {key: value for key, value in row.items() if key != "cells"}
        records += [names] if n == 3 else []  # Table 3 is words
        for column, cell in zip(source["columns"], row.get("cells", []), strict=True):
            figures = re.findall(r"[+-]?\d+\.\d+", cell)  # "79.42 / 62.01 +0.97 / +6.2"; none in "-"
            scores = [float(text) for text in figures if text[0].isdigit()]
            gains = [float(text) for text in figures if not text[0].isdigit()] or [np.nan] * len(scores)
            for task, dice, gain in zip(source["tasks"], scores, gains, strict=False):
                records.append({**names, **column, "task": task, "dice": dice, "gain": gain})
    frame = pd.DataFrame(records).dropna(axis="columns", how="all")
    frame.attrs["title"] = source["title"]
    return frame


def imprecise_visual_prompts(hole=False):
    """What imprecise mask prompts cost two 3D models, as published (arXiv 2601.16383): a row a radius, 0 for none.

    `lost` is the share of organs whose answer has nothing in common with the truth; NaN where that is not known.
    `hole` adds the shells, where a larger radius is a smaller error.
    """
    source, records = _source()["imprecise_visual_prompts"], []
    for row in source["rows"]:
        if row["prompt"] == "hole" and not hole:
            continue
        means = np.atleast_1d(row["dice"]).tolist()
        lost = row.get("lost", [np.nan] * len(means))
        for radius, dice, share in zip(range(len(means) > 1, 99), means, lost, strict=False):
            records.append(row | {"radius": radius, "dice": dice, "lost": share})
    frame = pd.DataFrame(records, columns=["model", "prompt", "radius", "dice", "lost"])
    frame.attrs.update(title=source["title"], source=source["source"])
    return frame


def evolved_prompt():
    """What SAMPOT prints of its films, its score and its evolved points (arXiv 2310.17128): a row a figure."""
    source = _source()["evolved_prompt"]
    frame = pd.DataFrame(source["rows"], columns=["figure", "value", "where"])
    frame.attrs.update(title=source["title"], source=source["source"])
    return frame


def preference_optimisation():
    """Dice of a semi-supervised SAM with preferences, as published (arXiv 2503.04639), in percent: a row a figure."""
    source = _source()["preference_optimisation"]
    frame = pd.DataFrame(source["rows"], columns=["table", "data", "setting", "dice"])
    frame.attrs.update(title=source["title"], source=source["source"])
    return frame


def claims():
    """Every arithmetic claim, part by part: what is claimed, what the tables give, and whether it holds.

    `kind` is "claim" where the paper says it and "reading" where its tables only invite the check.
    """
    records, found = [], _found()
    for name, facts in _source()["claims"].items():
        about = {"claim": name, "kind": "claim"} | {key: facts[key] for key in facts if key != "parts"}
        printed, values = found[name] if isinstance(found[name], tuple) else (None, found[name])
        for part, claimed in facts["parts"].items():
            key = tuple(part.split()) if " " in part else part
            claimed, value = claimed if printed is None else printed[key], values[key]
            value = round(float(value), 2) if isinstance(value, float) else value
            verdict = {"part": part, "claimed": claimed, "computed": value, "holds": _holds(claimed, value)}
            records.append(about | verdict)
    return pd.DataFrame(records)


def _holds(claimed, value):
    """Whether a value is the claimed one, one of several names, or beyond a bound such as "> 0"."""
    if isinstance(claimed, str) and claimed[0] in "<>":
        bound = float(claimed[1:])
        return value > bound if claimed[0] == ">" else value < bound
    return value in claimed if isinstance(claimed, list) else value == claimed


def _found():
    """Claim -> a Series of what its parts come to, or a pair: as one table prints it, as others give it."""
    first = table(1).query("prompts == 'text' and training != 'not said'")  # the SAM 3 row left is fine-tuned
    one = first.pivot(index=["dataset", "task"], columns="method", values="dice")
    two = table(2).pivot(index="task", columns="setting", values="dice")
    four = table(4).pivot(index="level", columns=["method", "task"], values="dice")
    five = table(5).pivot(index="dataset", columns="method", values="dice")
    printed_one = first[first["method"] == "Ours"].set_index(["dataset", "task"])["gain"]
    printed_five = table(5).query("method == 'Ours'").set_index("dataset")["gain"]

    rivals, gain = one.drop(columns="Ours"), one["Ours"] - one["SAM 3"]  # by data set and task
    full, neither = two["Full model"], two["w/o L_group, L_cons"]  # by task, as all of Table 2
    no_cons, pairwise = two["w/o L_cons"], two["L_cons (full pairwise)"]
    by_k, by_beta = two.filter(like="K="), two.filter(like="beta=")
    ours, sam3 = four["Ours"], four["SAM3"]  # level x task
    main = one.loc["PanNuke", ["Ours", "SAM 3"]].rename(columns={"SAM 3": "SAM3"}).unstack()  # method, task
    outside = np.maximum(four.min() - main, main - four.max()).clip(lower=0)
    over = five.rsub(five["Ours"], axis=0)  # ours minus each method, by data set
    return {
        "gain_over_sam3": gain,
        "strongest_text_baseline": rivals.idxmax(axis=1),
        "gain_printed_in_table_1": (printed_one, one["Ours"] - rivals.max(axis=1)),
        "best_under_text_prompts": one.idxmax(axis=1),
        "larger_gain_for_t2": gain.unstack()["T2"] - gain.unstack()["T1"],
        "without_both_is_sam3": (neither, main["SAM3"]),
        "drop_quoted": neither,
        "full_model_is_table_1": (full, main["Ours"]),
        "full_model_on_low_quality": (full, ours.loc["low"]),
        "sam3_on_low_quality": (neither, sam3.loc["low"]),
        "main_result_within_levels": outside,
        "drop_without_both": full - neither,
        "drop_without_cons": full - no_cons,
        "group_loss_alone_helps": no_cons - neither,
        "pairwise_below_full": full - pairwise,
        "pairwise_below_without_cons": no_cons - pairwise,
        "peak_of_k": by_k.idxmax(axis=1),
        "default_k_is_best": by_k.idxmax(axis=1),
        "decline_from_k_5": -by_k[["K=4", "K=5", "K=6"]].diff(axis=1).max(axis=1),
        "stable_over_k": by_k.min(axis=1) - neither,
        "robust_to_beta": by_beta.min(axis=1) - neither,
        "baseline_degrades": sam3.loc["high"] - sam3.loc["low"],
        "all_methods_by_level": ({"baselines": rivals.shape[1]}, {"baselines": four.shape[1] // 2 - 1}),
        "degrades_more_gracefully": (sam3.max() - sam3.min()) - (ours.max() - ours.min()),
        "variance_markedly_reduced": ours.var() / sam3.var(),
        "higher_at_each_level": (ours - sam3).min(),
        "largest_gain_at_low": (ours - sam3).idxmax(),
        "gain_printed_in_table_5": (printed_five, over["SAMPO"]),
        "average_zero_shot_gain": over.mean(),
        "average_gain_over_the_others": over.mean(),
        "six_zero_shot_tasks": {"tasks": len(five)},
        "best_on_most": {"columns": int((five.idxmax(axis=1) == "Ours").sum())},
        "decrease_on_cryonuseg": over["SAMPO"],
    }
