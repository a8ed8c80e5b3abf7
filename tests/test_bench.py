"""The benchmark of SAM3's steps: its table is what this code still does, counted and not timed."""

import importlib.util

import pytest
import transformers

import pgseg_lite as pg
from pgseg_lite.results import load_result


@pytest.fixture(scope="module")
def bench(repo):
    spec = importlib.util.spec_from_file_location("bench_sam3", repo / "benchmarks" / "bench_sam3.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def subject(bench):
    texts = [phrasing.text for phrasing in pg.PromptBank.load("nuclei").phrasings]
    tokenizer = transformers.CLIPTokenizerFast().train_new_from_iterator(texts, 1500, show_progress=False)
    return bench.sam3_subject("sam3 small", bench.small_config(tokenizer), tokenizer, "full")


@pytest.mark.parametrize(("way", "k"), [("shared", 1), ("shared", 3), ("serial", 3)])
def test_a_step_does_the_arithmetic_that_the_stored_table_says(repo, bench, subject, way, k):
    stored = load_result("sam3_steps", repo / "results")
    row = stored.query("model == 'sam3 small' and part == 'trained' and way == @way and k == @k").iloc[0]
    assert bench.gflop(subject, bench.case(subject, "trained", way, k)) == pytest.approx(row["gflop"], rel=1e-3)


def test_serial_steps_peak_far_below_parallel_ones(bench, subject):
    peak = {way: bench.peak_mib(bench.case(subject, "trained", way, 6)) for way in ("shared", "serial")}
    saved = {way: bench.saved_mib(subject, bench.case(subject, "trained", way, 6)) for way in ("shared", "serial")}
    assert peak["serial"] < 0.7 * peak["shared"] and saved["serial"] < 0.6 * saved["shared"]


def test_ratios_are_medians_over_rounds_and_naive_is_whole_passes(bench):
    def row(way, k, seconds, **more):
        return {"model": "m", "part": "trained", "way": way, "k": k, "cpu_s": seconds, "wall_s": seconds} | more

    rows = [row("shared", 1, [1, 2, 9], gflop=10), row("shared", 3, [2, 2, 9], gflop=12), row("naive", 3, [4, 6, 30])]
    table = bench.with_ratios(rows).set_index(["way", "k"])
    assert list(table["cpu_ratio"]) == [1, 1, pytest.approx(10 / 3)]
    assert table.loc[("shared", 3), "naive_over"] == 3 and table.loc[("shared", 3), "bound"] == 1.2
    assert table.loc[("naive", 3), "gflop"] == 30 and table.loc[("shared", 3), "naive_bound"] == 2.5
