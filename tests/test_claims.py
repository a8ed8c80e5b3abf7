"""The book's own figures: each is recomputed from the stored tables, stands on its page, and moves with its table."""

import ast
import json
import re
import shutil

import nbformat
import pytest
import yaml

from pgseg_lite import book, claims, results
from pgseg_lite.errors import ResultError

ROLE = re.compile(r"\{glue:text\}`([^`]+)`")
RECORD = "application/papermill.record/text/plain"


@pytest.fixture(scope="module")
def listed():
    return claims.table()


def pages(repo):
    return {path.stem: nbformat.read(path, as_version=4) for path in book.chapters(repo / "notebooks")}


def glued(notebook) -> dict[str, str]:
    """{claim: text} that a chapter's stored outputs hand to its prose."""
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    return {
        o.metadata.scrapbook.name: ast.literal_eval(o.data[RECORD])
        for o in outputs
        if "scrapbook" in o.get("metadata", {})
    }


def prose(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def number(text) -> float | None:
    found = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*%?", text)
    return float(found[1]) if found else None


def test_pages_show_what_the_tables_give(repo, listed):
    shown = {name: text for notebook in pages(repo).values() for name, text in glued(notebook).items()}
    assert set(shown) == set(listed["claim"])
    for row in listed.itertuples():
        ours, theirs = number(row.shown), number(shown[row.claim])
        if ours is None:
            assert shown[row.claim] == row.shown, row.claim
        else:
            assert theirs == pytest.approx(ours, abs=row.tolerance), row.claim


def test_every_claim_is_used_in_its_chapter_and_nothing_else_is(repo, listed):
    for name, notebook in pages(repo).items():
        assert set(ROLE.findall(prose(notebook))) == set(listed.loc[listed["chapter"] == name, "claim"]), name


def test_prose_of_the_chapters_with_claims_types_no_figure(repo, listed):
    """Decimals and percentages come through claims or outputs; code, formulas, links and citations may hold any."""
    aside = re.compile(
        r"```.*?```|:::\{admonition\} Solution.*?\n:::|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|arXiv \S+", re.S
    )
    for name in listed["chapter"].unique():
        text = aside.sub(" ", prose(pages(repo)[name]))
        typed = [hit for hit in re.findall(r"[^\n]{0,30}\b\d+\.\d+\b|[^\n]{0,30}\b\d+ ?%", text) if "95 %" not in hit]
        assert not typed, (name, typed)


def test_tolerances_allow_for_a_rerun_and_say_more_than_the_interval(listed):
    judged = {n: c for n, c in claims.load().items() if "reference" in c and c["column"] in ("value", "difference")}
    assert len(judged) > 50
    for name, claim in judged.items():
        floor, ceiling = claims.bounds(claim)
        assert floor <= claim["tolerance"] <= ceiling, (name, floor, ceiling)


def test_every_table_belongs_to_an_experiment_or_a_measurement(repo):
    from pgseg_lite.experiments import EXPERIMENTS
    from pgseg_lite.studies import STUDIES

    known = {*EXPERIMENTS, *STUDIES, *(f"{name}_phrasings" for name, e in EXPERIMENTS.items() if e.detail)}
    known |= {"consep_lite", "consep_blind", "sam3_cost", "sam3_steps"}
    assert {path.stem for path in (repo / "results").glob("*.csv")} == known


PAGE = """\
---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A page

```{code-cell} ipython3
from pgseg_lite import claims

claims.tell("00_say_it")
```

The full method reaches {glue:text}`full_t1`.
"""


@pytest.mark.book
def test_a_changed_table_changes_the_page(repo, tmp_path):
    """results/ of its own beside the page: first a copy of the stored table, then one with ten points more."""
    table = results.load_result("table1", repo / "results")
    entry = {"says": "T1", "result": "table1", "reference": "one fixed phrasing", "show": "{:.1f}", "tolerance": 1}
    entry["where"] = {"test": "CoNSeP", "split": "heldout", "method": "full method", "task": "T1"}
    for folder in ("book", "results", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "results" / "claims.yaml").write_text(yaml.safe_dump({"00_say_it": {"full_t1": entry}}))
    shutil.copy(repo / "_config.yml", tmp_path)
    shutil.copytree(repo / "book", tmp_path / "book", dirs_exist_ok=True)
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: notebooks/00_say_it\n")
    (tmp_path / "notebooks" / "00_say_it.md").write_text(PAGE)
    page = tmp_path / "notebooks" / "00_say_it.ipynb"
    book.sync(page)
    said = []
    for more in (0.0, 0.1):
        results.save_result(
            "table1", table.assign(dice=table["dice"] + more), table.attrs["stamp"], tmp_path / "results"
        )
        book.execute([page], output=tmp_path / "_build" / "executed")
        html = book.build(tmp_path, executed=tmp_path / "_build" / "executed") / "notebooks" / "00_say_it.html"
        said.append(
            float(re.search(r"The full method reaches\D*?(\d+\.\d)", re.sub("<[^>]+>", "", html.read_text()))[1])
        )
    assert said[1] - said[0] == pytest.approx(10, abs=0.11)


def test_a_claim_that_fits_no_row_or_lacks_a_field_says_so(monkeypatch, tmp_path):
    claim = {"result": "table1", "reference": "one fixed phrasing", "where": {"method": "magic"}}
    with pytest.raises(ResultError, match=r"0 rows fit .*magic.*exactly one"):
        claims.value(claim)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "claims.yaml").write_text(json.dumps({"00_x": {"a": {"says": "nothing"}}}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResultError, match="claim a lacks result, where"):
        claims.load()
