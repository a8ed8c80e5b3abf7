"""The book's machinery on throwaway chapters, then the book itself as its reader gets it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from pgseg_lite import book
from pgseg_lite.cli import main
from pgseg_lite.errors import PgsegError

AS_NOBODY = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]

SOURCE = """\
---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter

```{code-cell} ipython3
:tags: [parameters]

PROFILE = "lite"
```

```{code-cell} ipython3
:tags: [nbval-check-output]

print(PROFILE)
```

```{code-cell} ipython3
print("not checked")
```
"""


@pytest.fixture
def chapter(tmp_path) -> Path:
    """A pair that says the same, its .ipynb without outputs."""
    path = tmp_path / "notebooks" / "01_try_it.ipynb"
    path.parent.mkdir()
    path.with_suffix(".md").write_text(SOURCE)
    book.sync(path)
    return path


def edit(path: Path, change) -> None:
    nb = nbformat.read(path, as_version=4)
    change(nb)
    nbformat.write(nb, path)


def test_a_synced_pair_has_no_drift_whatever_its_timestamps(chapter):
    chapter.with_suffix(".md").touch()
    assert book.check_pairs([chapter]) == []


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda nb: nb.cells[0].update(source="# Another title"), 1),
        (lambda nb: nb.cells[2].metadata.update(tags=[]), 3),
        (lambda nb: nb.cells.__setitem__(3, new_markdown_cell(nb.cells[3].source)), 4),
        (lambda nb: nb.cells.append(new_code_cell("1 + 1")), 5),
        (lambda nb: nb.cells.pop(), 4),
    ],
    ids=["source", "tags", "type", "cell too many", "cell too few"],
)
def test_drift_is_found_and_named(chapter, change, number):
    edit(chapter, change)
    (problem,) = book.check_pairs([chapter])
    assert f"cell {number} " in problem and chapter.name in problem and "pgseg book sync" in problem


def test_metadata_that_papermill_leaves_is_no_drift(chapter):
    edit(chapter, lambda nb: nb.cells[3].metadata.update(tags=[], papermill={"duration": 1.0}, execution={}))
    assert book.check_pairs([chapter]) == []


@pytest.mark.parametrize("suffix", [".md", ".ipynb"])
def test_half_a_pair_is_found(chapter, suffix):
    chapter.with_suffix(suffix).unlink()
    (problem,) = book.check_pairs(book.chapters(chapter.parent))
    assert f"{chapter.stem}{suffix} is missing" in problem


def test_sync_keeps_outputs_of_unchanged_cells_only(chapter):
    def run(nb):
        for count, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), 1):
            cell.update(execution_count=count, outputs=[new_output("stream", text=f"{count}\n")])
        nb.metadata["widgets"] = {"state": {"1": "a slider at 3"}}

    edit(chapter, run)
    before = nbformat.read(chapter, as_version=4)
    chapter.with_suffix(".md").write_text(SOURCE.replace('"not checked"', '"changed"'))
    book.sync(chapter)
    after = nbformat.read(chapter, as_version=4)
    assert book.check_pairs([chapter]) == []
    assert [len(c.outputs) for c in after.cells if c.cell_type == "code"] == [1, 1, 0]
    assert [c.id for c in after.cells[:3]] == [c.id for c in before.cells[:3]]
    assert set(after.metadata) == {"kernelspec", "language_info", "widgets"}
    assert after.metadata["widgets"] == before.metadata["widgets"]


@pytest.mark.papermill
def test_execute_gives_the_profile_to_the_notebook_and_leaves_the_source_alone(chapter, tmp_path, capsys):
    stored = chapter.read_bytes()
    book.execute([chapter], "smoke", tmp_path / "out")
    ran = nbformat.read(tmp_path / "out" / chapter.name, as_version=4)
    assert [c.outputs[0].text for c in ran.cells if c.get("outputs")] == ["smoke\n", "not checked\n"]
    assert not any("papermill" in c.metadata or c.metadata.get("tags") == [] for c in ran.cells)
    assert chapter.read_bytes() == stored
    assert re.search(rf"{chapter.name} +\d+\.\d s", capsys.readouterr().out)


@pytest.mark.papermill
def test_execute_keeps_lite_outputs_when_asked_and_only_those(chapter, tmp_path):
    book.execute([chapter], "lite", tmp_path / "out", keep=True)
    kept = nbformat.read(chapter, as_version=4)
    assert [c.execution_count for c in kept.cells if c.cell_type == "code"] == [1, 2, 3]
    assert kept.cells[2].outputs[0].text == "lite\n"
    assert book.check_pairs([chapter]) == []
    with pytest.raises(PgsegError, match="only outputs of the lite profile"):
        book.execute([chapter], "smoke", tmp_path / "out", keep=True)


@pytest.mark.papermill
def test_execute_says_which_notebook_failed_and_how(chapter, tmp_path):
    chapter.with_suffix(".md").write_text(SOURCE.replace('print("not checked")', "1 / 0"))
    book.sync(chapter)
    with pytest.raises(PgsegError, match=r"01_try_it\.ipynb: ZeroDivisionError: division by zero"):
        book.execute([chapter], "smoke", tmp_path / "out")


def test_execute_refuses_a_drifted_pair(chapter, tmp_path):
    edit(chapter, lambda nb: nb.cells.pop())
    with pytest.raises(PgsegError, match="pgseg book sync"):
        book.execute([chapter], "smoke", tmp_path / "out")


# ---- copies for a class ----

EXERCISES = """
## Exercises

**1. Add.** What is one and one?

:::{admonition} Solution
:class: dropdown

```python
print("secret")
```
:::

**2. Think.** And why?

:::{admonition} Hints
:class: dropdown

Count.
:::
"""


def test_a_handout_has_an_empty_cell_for_each_solution_no_outputs_and_all_else(chapter, tmp_path, capsys, monkeypatch):
    chapter.with_suffix(".md").write_text(SOURCE + EXERCISES)
    book.sync(chapter)
    edit(chapter, lambda nb: nb.cells[2].update(outputs=[new_output("stream", text="lite\n")], execution_count=2))
    stored = chapter.read_bytes()
    monkeypatch.chdir(chapter.parents[1])
    assert main(["book", "handout", str(tmp_path / "for" / "class")]) == 0
    (copy,) = (tmp_path / "for" / "class").iterdir()
    assert capsys.readouterr().out.split() == [str(copy)]
    nb = nbformat.read(copy, as_version=4)
    nbformat.validate(nb)
    assert [c.cell_type for c in nb.cells[-3:]] == ["markdown", "code", "markdown"]
    assert nb.cells[-2].source == "# your answer" and "secret" not in copy.read_text()
    assert "one and one" in nb.cells[-3].source and "Count." in nb.cells[-1].source
    assert book.cells(copy)[:4] == book.cells(chapter)[:4]
    assert not any(c.outputs or c.execution_count for c in nb.cells if c.cell_type == "code")
    assert chapter.read_bytes() == stored

    copy.write_text("a student's work")
    assert main(["book", "handout", str(copy.parent)]) == 2
    assert "may hold somebody's answers" in capsys.readouterr().err and copy.read_text() == "a student's work"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a_file"], "a_file: a file; give a folder for the copies"),
        (["new", "--only", "99_"], "no notebook with '99_'"),
        (["notebooks"], "already"),
    ],
    ids=["file", "no such chapter", "the book itself"],
)
def test_a_handout_that_cannot_be_is_refused(chapter, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(chapter.parents[1])
    Path("a_file").touch()
    assert main(["book", "handout", *arguments]) == 2
    assert said in capsys.readouterr().err and not Path("new").exists()


def test_a_solution_without_an_end_is_not_handed_out(chapter, tmp_path):
    chapter.with_suffix(".md").write_text(SOURCE + EXERCISES.replace("```\n:::\n", "```\n").partition("**2.")[0])
    with pytest.raises(PgsegError, match="a solution has no end"):
        book.handout([chapter], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_no_solution_of_the_book_is_handed_out(repo, tmp_path):
    found = book.chapters(repo / "notebooks")
    for path, copy in zip(found, book.handout(found, tmp_path), strict=True):
        solutions = path.with_suffix(".md").read_text().count("{admonition} Solution")
        copied = nbformat.read(copy, as_version=4)
        assert sum(cell.source == "# your answer" for cell in copied.cells) == solutions >= 3
        assert "Solution" not in copy.read_text()


# ---- the book's address ----


@pytest.fixture
def checkout(repo, tmp_path) -> Path:
    """What the address is written into, and what a bootstrap installs, apart from the checkout that runs the tests."""
    home = tmp_path / "checkout"
    for name in ("notebooks", "pgseg_lite", "results"):
        shutil.copytree(repo / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_config.yml", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, home)
    return home


def bootstrap(md: Path) -> str:
    (found,) = re.findall(
        r"import importlib\.util\n.*?    sys\.path\.insert\(0, str\(checkout\)\)\n", md.read_text(), re.S
    )
    return found


def test_all_chapters_have_one_bootstrap(repo):
    (cell,) = {bootstrap(path.with_suffix(".md")) for path in book.chapters(repo / "notebooks")}
    assert '\nREPOSITORY = "' in cell  # empty here; a fork has its own


def test_an_address_is_written_everywhere_and_replaced_by_the_next_with_all_outputs_kept(checkout, monkeypatch):
    def outputs():
        cells = [cell for path in book.chapters("notebooks") for cell in nbformat.read(path, as_version=4).cells]
        return [(cell.id, cell.get("outputs"), cell.get("execution_count")) for cell in cells]

    monkeypatch.chdir(checkout)
    before = outputs()
    for repository in ("octocat/hello-world", "a-course/many.words_2"):
        assert main(["book", "address", repository]) == 0
        url = f"https://github.com/{repository}"
        for path in book.chapters("notebooks"):
            link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
            first = nbformat.read(path, as_version=4).cells[0].source.split("\n")
            assert first[0].startswith("# ") and re.fullmatch(rf"\[!\[Open in Colab\]\(https.*\)\]\({link}\)", first[2])
            assert path.with_suffix(".md").read_text().count("Open in Colab") == 1
            assert f'\nREPOSITORY = "{url}"  #' in bootstrap(path.with_suffix(".md"))
        config = yaml.safe_load(Path("_config.yml").read_text())
        assert config["repository"] == {"url": url, "branch": "main"}
        assert config["launch_buttons"] == {"thebe": False, "colab_url": "https://colab.research.google.com"}
        assert book.check_pairs(book.chapters("notebooks")) == [] and outputs() == before
    assert book.give_address(repository) == []
    assert Path("_config.yml").read_text().count("colab_url") == 1


@pytest.mark.parametrize("repository", ["hello-world", "https://github.com/a/b", "a/b/c", 'a/b"c', ""])
def test_what_is_no_repository_is_refused_before_anything_is_written(checkout, monkeypatch, repository, capsys):
    monkeypatch.chdir(checkout)
    text = Path("_config.yml").read_text()
    assert main(["book", "address", repository]) == 2 and "is not OWNER/NAME" in capsys.readouterr().err
    assert Path("_config.yml").read_text() == text


def test_the_bootstrap_cell_as_it_stands_installs_the_module_from_its_address(checkout, tmp_path):
    """As on Colab: no module, no checkout. Git is told that GitHub is a folder here, and pip not to use a network."""
    book.give_address("octocat/hello-world", checkout)
    (tmp_path / "github/octocat").mkdir(parents=True)
    origin = checkout.rename(tmp_path / "github/octocat/hello-world")
    for words in (["init", "-q"], ["add", "-A"], [*AS_NOBODY, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=origin, check=True)
    (cell, *_) = [
        c.source for c in book.read(origin / "notebooks/08_reproduce_table_1.md").cells if c.cell_type == "code"
    ]
    (empty := tmp_path / "content").mkdir()
    env = os.environ | {
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/github/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1",
        "PIP_TARGET": str(tmp_path / "target"),
    }  # fmt: skip
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    asks = "\nprint(pg.__file__); print(results.find_result('table1.csv'))"
    started = f"import sys; sys.path.append({packages!r})\n"  # -S: without the editable install that the tests run from
    command = [sys.executable, "-I", "-S", "-c", started + cell + asks]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=empty, env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    clone = empty / "pgseg-lite"
    assert ran.stdout.split() == [str(clone / "pgseg_lite/__init__.py"), str(clone / "results/table1.csv")]
    assert list((tmp_path / "target").glob("pgseg_lite-*.dist-info")), "pip has installed it for later kernels"

    nowhere = cell.replace('REPOSITORY = "https://github.com/octocat/hello-world"', 'REPOSITORY = ""')
    (tmp_path / "bare").mkdir()
    command = [sys.executable, "-I", "-S", "-c", started + nowhere]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "bare", env=env)
    assert ran.returncode == 1 and ran.stderr.strip() == "no pgseg_lite here: clone the repository"


# ---- a build that goes wrong ----


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A book of one page."""
    for name in ("book", "notebooks", "pgseg_lite", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "_config.yml").write_text('title: T\nonly_build_toc_files: true\nexecute: {execute_notebooks: "off"}\n')
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
    (tmp_path / "book/index.md").write_text("# Title\n\nText.\n")
    return tmp_path


@pytest.mark.book
def test_a_warning_stops_the_build_and_is_shown(tiny):
    (tiny / "book/index.md").write_text("# Title\n\n{doc}`nowhere`\n")
    with pytest.raises(PgsegError, match=r"(?s)without warnings.*nowhere"):
        book.build(tiny)


@pytest.mark.book
def test_images_keep_the_alt_text_of_their_output(tiny):
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    meta = [{"image/png": {"alt": alt}} for alt in ('A "first" pixel', "A second & last pixel")]
    outputs = [new_output("display_data", {"image/png": pixel}, metadata=m) for m in meta]
    cell = new_code_cell("show()", outputs=outputs, execution_count=1)
    book.write(new_notebook(cells=[new_markdown_cell("# Page"), cell]), tiny / "notebooks/a.ipynb")
    (tiny / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n- file: notebooks/a\n")
    page = (book.build(tiny) / "notebooks/a.html").read_text()
    assert 'alt="A &quot;first&quot; pixel"' in page and 'alt="A second &amp; last pixel"' in page


@pytest.mark.book
def test_a_missing_page_is_found(tiny):
    html = book.build(tiny)
    assert book.page_count(html, tiny) == 1
    (html / "book/index.html").rename(html / "book/other.html")
    with pytest.raises(PgsegError, match=r"not those of _toc\.yml"):
        book.page_count(html, tiny)


# ---- the book itself ----


@pytest.fixture(scope="session")
def html(repo, tmp_path_factory) -> Path:
    """The pages of the committed outputs, built outside the checkout."""
    return book.build(repo, tmp_path_factory.mktemp("book"))


def pages(repo: Path) -> list[str]:
    from sphinx_external_toc.parsing import parse_toc_yaml

    return sorted(parse_toc_yaml(repo / "_toc.yml"))


@pytest.mark.book
def test_the_book_builds_without_warnings_and_with_every_page(html, repo):
    assert book.page_count(html, repo) == len(pages(repo))


def test_every_chapter_is_in_the_table_of_contents(repo):
    chapters = {f"notebooks/{path.stem}" for path in book.chapters(repo / "notebooks")}
    assert chapters == {page for page in pages(repo) if page.startswith("notebooks/")}


@pytest.mark.book
def test_links_within_the_book_lead_somewhere(html, repo):
    broken = []
    for page in pages(repo):
        text = (html / f"{page}.html").read_text()
        for target in re.findall(r'(?:href|src)="([^"#][^"]*)"', text):
            parts = urlsplit(target)
            if not parts.scheme and not (html / page).parent.joinpath(unquote(parts.path)).exists():
                broken.append(f"{page}: {target}")
    assert not broken


# What of the article reaches beyond a phone's width and does not scroll inside itself.
WIDE = """[...document.querySelectorAll('article *')].filter(e => {
    for (let p = e; p.tagName != 'ARTICLE'; p = p.parentElement)
        if (getComputedStyle(p).overflowX != 'visible') return false;
    return e.getBoundingClientRect().right > 390;
}).map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.browser
def test_every_page_opens_in_a_browser(html, repo, browser):
    problems = []
    for page in pages(repo):
        said = browser.open(html / f"{page}.html")
        if len(browser.evaluate("document.querySelector('h1')?.textContent ?? ''")) < 3:
            said.append("no title")
        bad = "[...document.images].filter(i => !i.alt.trim() || !i.naturalWidth && !i.src.startsWith('http')).map(i => i.outerHTML)"
        said += [f"no alt text, or broken: {image[:160]}" for image in browser.evaluate(bad)]
        browser.open(html / f"{page}.html", width=390, height=844)
        if browser.evaluate("document.documentElement.scrollWidth") > 390:
            said.append(f"wider than a phone: {browser.evaluate(WIDE)}")
        problems += [f"{page}: {line}" for line in said]
    assert not problems, "\n".join(problems)


# The pictures, labels and alt texts that one slider shows while its handle goes from end to end.
SLIDE = """(async box => {
    const input = box.querySelector('input'), image = box.querySelector('img'), seen = [];
    for (let value = 0; value <= Number(input.max); value++) {
        input.value = value;
        input.dispatchEvent(new Event('input'));
        await image.decode();
        seen.push([image.src, box.querySelector('output').textContent, image.alt]);
    }
    return seen;
})(document.querySelectorAll('.pgseg-slider')[%d])"""


@pytest.mark.browser
def test_every_slider_moves_its_picture_on_a_page_from_disk_without_a_network(html, repo, browser):
    sliders = 0
    for page in pages(repo):
        browser.open(html / f"{page}.html")
        for number in range(browser.evaluate("document.querySelectorAll('.pgseg-slider').length")):
            frames = browser.evaluate(SLIDE % number)
            pictures, labels, alts = (len(set(column)) for column in zip(*frames, strict=True))
            assert pictures == labels == alts == len(frames) > 1, f"{page}: slider {number + 1}"
            sliders += 1
    assert sliders >= 3


@pytest.mark.browser
def test_a_slider_moves_by_key(html, browser):
    browser.open(html / "notebooks/00_see_disagreement.html")
    before = browser.evaluate("document.querySelector('.pgseg-slider img').src")
    browser.evaluate("document.querySelector('.pgseg-slider input').focus()")
    for kind in ("rawKeyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    assert browser.evaluate("document.querySelector('.pgseg-slider img').src") != before


@pytest.mark.browser
def test_the_browser_check_sees_what_it_should(tmp_path, browser):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><title>t</title>'
        '<script src="https://example.org/blocked.js"></script><script>console.error("said"); boom()</script>'
        '<article><div style="width: 900px">wide</div></article>'
    )
    said = browser.open(page, width=390, height=844)
    assert len(said) == 2 and "said" in said and any("boom is not defined" in line for line in said)
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
    assert browser.evaluate(WIDE)
    shutil.rmtree(tmp_path)
