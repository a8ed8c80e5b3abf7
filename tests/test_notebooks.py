"""Every chapter as it is committed: paired, executed, described, small, and still true when it runs again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from pgseg_lite import book
from pgseg_lite.errors import PgsegError

NOT_SECTIONS = ("Exercises", "Recap", "What is next")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = book.chapters(ROOT / "notebooks")
PAGES = sorted([*ROOT.glob("notebooks/*.md"), *ROOT.glob("book/*.md")])


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


def test_every_section_ends_in_a_claim(path):
    last = {"": None}  # heading -> the last code cell under it
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            last |= dict.fromkeys(re.findall(r"^## (.+)$", cell.source, re.MULTILINE))
        else:
            last[[*last][-1]] = cell
    sections = {heading: cell for heading, cell in last.items() if heading not in ("", *NOT_SECTIONS)}
    assert len(sections) >= 4
    without = [
        h for h, cell in sections.items() if not cell or "claim" not in tags(cell) or "assert" not in cell.source
    ]
    assert not without, "a section's last cell is tagged `claim` and asserts what the section says"


def test_has_exercises_with_hidden_solutions(path):
    text = path.with_suffix(".md").read_text().partition("## Exercises")[2]
    assert len(re.findall(r":::\{admonition\} Solution\n:class: dropdown\n", text)) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_box_is_closed_on_a_line_of_its_own(page):
    text = page.read_text()
    assert not re.findall(r"^.*[^\s:].*:::$", text, re.MULTILINE), "the box swallows what follows, headings included"
    opened, closed = (re.findall(rf"^ *:::+{end}", text, re.MULTILINE) for end in (r"\{.+", r" *$"))
    assert len(opened) == len(closed)


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


PROBE = """
contrary = dict(globals())
exec({falsify!r}, contrary)
try:
    exec({claim!r}, contrary)
except AssertionError:
    pass
else:
    raise RuntimeError({claim!r} + " holds even after " + {falsify!r})
"""


def with_probes(path, folder):
    """A copy of the chapter that, before each claim, sees the claim fail in a world made contrary to it."""
    nb = nbformat.read(path, as_version=4)
    for cell in [cell for cell in nb.cells if "claim" in tags(cell)]:
        probe = PROBE.format(falsify=cell.metadata["falsify"], claim=cell.source)
        nb.cells.insert(nb.cells.index(cell), nbformat.v4.new_code_cell(probe))
    jupytext.write(nb, folder / f"{path.stem}.md", fmt="md:myst")
    book.sync(folder / path.name)
    return folder / path.name


@pytest.mark.papermill
def test_runs_at_smoke_from_an_empty_folder_and_every_claim_can_fail(path, tmp_path):
    book.execute([with_probes(path, tmp_path)], "smoke", tmp_path / "out")


@pytest.mark.papermill
def test_a_claim_that_cannot_fail_is_found(tmp_path):
    text = NOTEBOOKS[0].with_suffix(".md").read_text().partition("# ")[0]
    text += "```{code-cell} ipython3\n:tags: [claim]\n:falsify: x = 0\n\nx = 1\nassert x\n```\n"
    (tmp_path / "01_claim_nothing.md").write_text(text)
    book.sync(tmp_path / "01_claim_nothing.ipynb")
    with pytest.raises(PgsegError, match="holds even after x = 0"):
        book.execute([with_probes(tmp_path / "01_claim_nothing.ipynb", tmp_path)], "smoke", tmp_path / "out")


@pytest.mark.nbval
def test_still_prints_what_is_stored(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider"]
    command += ["--nbval-sanitize-with", Path(__file__).with_name("nbval.cfg"), "-c", os.devnull, "-q", copy]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
