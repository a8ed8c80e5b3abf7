"""The computed cost of a step of SAM3, and `serial` chosen by it."""

from dataclasses import replace

import pytest

import pgseg_lite as pg
from pgseg_lite.models import cost, finetune

FULL = pg.Sam3Settings(trainable="full", accumulation=1)


def test_steps_have_the_ratios_of_their_flops():
    def ratio(trainable, k):
        return cost.step_flops(trainable, k) / cost.step_flops(trainable, 1)

    assert [round(ratio("full", k), 2) for k in (1, 3, 6)] == [1, 1.15, 1.36]
    assert [round(ratio("decoder", k), 2) for k in (1, 3, 6)] == [1, 1.38, 1.95]
    assert 3 * cost.step_flops("full", 1) / cost.step_flops("full", 3) == pytest.approx(2.62, abs=0.01)
    assert 30 * cost.evaluation_flops(1) / cost.evaluation_flops(30) == pytest.approx(9.7, abs=0.1)
    again = cost.step_flops("full", 3, checkpointing=True) - cost.step_flops("full", 3)
    assert again == pytest.approx(cost.IMAGE)
    assert cost.step_flops("decoder", 3, checkpointing=True) == cost.step_flops("decoder", 3)
    assert cost.step_flops("full", 3, serial=True) - cost.step_flops("full", 3) == pytest.approx(3 * cost.PHRASING)
    assert cost.step_flops("lora", 3, batch=2) == 2 * cost.step_flops("lora", 3) < 2 * cost.step_flops("full", 3)


def test_what_fits_and_how_long_it_takes():
    small, large = cost.expected("T4", FULL, 18), cost.expected("A100 80 GB", FULL, 18)
    assert small.serial and small.fits and not large.serial
    assert 9 < small.memory < 14 and small.memory + 15 < large.memory  # 18 phrasings at once
    work = cost.step_flops("full", 18, checkpointing=True)
    assert large.seconds == pytest.approx(work / (312 * cost.UTILISATION))
    assert cost.expected("A100 80 GB", replace(FULL, accumulation=4), 18).seconds == pytest.approx(4 * large.seconds)
    assert not cost.expected("T4", replace(FULL, checkpointing=False), 18).fits


def test_serial_is_chosen_by_memory_unless_it_is_set():
    sam = cost.full_size()
    chosen = {memory: finetune.choose_serial(sam, FULL, 18, memory).serial for memory in (None, 20, 40)}
    assert chosen == {None: True, 20: True, 40: False}  # a CPU, a small GPU, a large one
    for serial in (True, False):
        assert finetune.choose_serial(sam, replace(FULL, serial=serial), 18, 20).serial is serial
