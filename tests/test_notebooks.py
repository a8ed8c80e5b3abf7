"""Every chapter as it is committed: paired, executed, described, small, and still true when it runs again."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from pgseg_lite import book

NOTEBOOKS = book.chapters(Path(__file__).resolve().parents[1] / "notebooks")


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def code(path) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and c.source.strip()]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def test_there_are_chapters():
    assert NOTEBOOKS


def test_pair_has_no_drift(path):
    assert book.check_pairs([path]) == []


def test_name_says_what_is_done(path):
    number, verb, *noun = path.stem.split("_")
    assert number.isdigit() and len(number) == 2 and verb and noun, "NN_verb_noun.ipynb"


def test_is_valid_and_has_only_the_metadata_that_matters(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert set(nb.metadata) <= {"kernelspec", "language_info", "widgets"}
    assert nb.metadata.kernelspec.name == "python3"
    assert not any({"papermill", "execution"} & set(cell.metadata) for cell in nb.cells)


def test_was_run_from_top_to_bottom(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_no_cell_failed(code):
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]


def test_at_least_three_outputs_are_checked(code):
    checked = [cell for cell in code if "nbval-check-output" in tags(cell)]
    assert len(checked) >= 3
    assert all(cell.outputs for cell in checked), "a checked cell without a stored output checks nothing"


def test_no_cell_is_long(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not {n: s for n, c in enumerate(cells, 1) if c.cell_type == "code" and (s := c.source.count("\n") + 1) > 25}


def test_has_one_parameters_cell_with_the_profile(code):
    (parameters,) = [cell for cell in code if "parameters" in tags(cell)]
    assert 'PROFILE = "lite"' in parameters.source


def test_every_image_has_alt_text(code):
    without = []
    for cell in code:
        for out in cell.outputs:
            for kind in (k for k in out.get("data", {}) if k.startswith("image/")):
                if len(out.metadata.get(kind, {}).get("alt", "")) < 20:
                    without.append(f"In [{cell.execution_count}]: {kind}")
    assert not without, "show figures with pgseg_lite.plots.show(fig, alt=...)"


def test_is_small(path):
    assert path.stat().st_size < 3_000_000


@pytest.mark.papermill
def test_runs_at_smoke_from_an_empty_folder(path, tmp_path):
    book.execute([path], "smoke", tmp_path / "out")


@pytest.mark.nbval
def test_still_prints_what_is_stored(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider"]
    command += ["--nbval-sanitize-with", Path(__file__).with_name("nbval.cfg"), "-c", os.devnull, "-q", copy]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
