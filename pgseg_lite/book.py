"""The book's machinery: keep each notebook's pair equal, run the notebooks, build the pages.

A chapter is two files: NAME.md (MyST) is what people edit and review, NAME.ipynb carries the outputs.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat, zip_longest
from multiprocessing import get_context
from pathlib import Path

from .errors import PgsegError

STAGED = ("_config.yml", "_toc.yml", "book", "notebooks", "pgseg_lite", "results")  # what a page may include
COLAB = "https://colab.research.google.com"
SOLUTION = re.compile(r"^:::\{admonition\} Solution\b(?:(?!:::\{).)*?^:::$", re.MULTILINE | re.DOTALL)
ANSWER = "```{code-cell} ipython3\n# your answer\n```"
EXTRA_PAGES = {"index", "genindex", "search"}  # Sphinx adds these; index only redirects to the root page


class AltText:
    """A MyST-NB plug-in: an image keeps the alt text that its output's metadata holds."""

    mime_priority_overrides = ()

    @staticmethod
    def handle_mime(renderer, data, inline):
        if alt := data.output_metadata.get(data.mime_type, {}).get("alt"):
            (image,) = renderer.render_image(data)
            image["alt"] = alt
            return [image]
        return None  # not ours: MyST-NB renders it


def chapters(folder="notebooks") -> list[Path]:
    """The .ipynb path of every chapter, also of one that has only its .md so far."""
    return sorted({p.with_suffix(".ipynb") for s in ("ipynb", "md") for p in Path(folder).glob(f"*.{s}")})


def read(path: Path):
    import jupytext

    return jupytext.read(path, fmt="md:myst" if path.suffix == ".md" else "ipynb")


def write(nb, path: Path) -> None:
    """Keep only the metadata that matters: two runs of a notebook then differ in their outputs alone."""
    import nbformat

    for cell in nb.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if v and k not in ("papermill", "execution")}
    widgets = {k: v for k, v in nb.metadata.items() if k == "widgets" and v}  # the state that pages hydrate from
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.update(metadata={"kernelspec": kernel, "language_info": {"name": "python"}, **widgets}, nbformat_minor=5)
    nbformat.write(nbformat.from_dict(nb), path)


def cells(path: Path) -> list[tuple]:
    return [(c.cell_type, c.source.strip(), sorted(c.metadata.get("tags", []))) for c in read(path).cells]


def check_pairs(notebooks: list[Path]) -> list[str]:
    """One sentence for each pair whose cells differ in type, source or tags; timestamps say nothing."""
    problems = []
    for path in notebooks:
        pair = (path.with_suffix(".md"), path)
        if missing := [half for half in pair if not half.exists()]:
            problems.append(f"{missing[0]} is missing; `pgseg book sync` makes the .ipynb from the .md")
        elif (both := [*map(cells, pair)])[0] != both[1]:
            number = next(n for n, (a, b) in enumerate(zip_longest(*both), 1) if a != b)
            problems.append(f"{path}: cell {number} is not that of the .md; run `pgseg book sync`")
    return problems


def sync(notebook: Path) -> None:
    """Write the .ipynb anew from its .md; a cell whose source is unchanged keeps its id and outputs."""
    new, kept = read(notebook.with_suffix(".md")), {}
    old = read(notebook) if notebook.exists() else new
    new.metadata |= {k: v for k, v in old.metadata.items() if k == "widgets"}  # what the kept outputs refer to
    for cell in old.cells:
        kept.setdefault((cell.cell_type, cell.source.strip()), []).append(cell)
    for cell in new.cells:
        if same := kept.get((cell.cell_type, cell.source.strip())):
            cell.update({k: v for k, v in same.pop(0).items() if k in ("id", "outputs", "execution_count")})
    write(new, notebook)


def give_address(repository: str, source=".") -> list[Path]:
    """Write OWNER/NAME on GitHub into the book: its buttons, a badge a chapter, and where a chapter clones from.

    Returns the files that changed. Outputs stay, since none of it changes what a chapter computes.
    """
    if not re.fullmatch(r"[\w-]+/[\w.-]+", repository):
        raise PgsegError(f"{repository!r} is not OWNER/NAME of a GitHub repository, as in octocat/hello-world")
    url, source, changed = f"https://github.com/{repository}", Path(source), []
    found = chapters(source / "notebooks")
    if problems := check_pairs(found):
        raise PgsegError("\n".join(problems))
    config = source / "_config.yml"
    text = config.read_text("utf-8")
    new = re.sub(r"(?m)^# No repository button.*\n", "", text)
    new = re.sub(r"(?m)^(repository:\n)(?:  .*\n)*", rf"\1  url: {url}\n  branch: main\n", new)
    new = re.sub(r"(?m)^(launch_buttons:\n)(?:  .*\n)*", rf"\1  thebe: false\n  colab_url: {COLAB}\n", new)
    if new != text:
        config.write_text(new, "utf-8")
        changed.append(config)
    for path in found:
        page = f"{COLAB}/github/{repository}/blob/main/notebooks/{path.name}"
        badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({page})"

        def addressed(text, badge=badge):
            text = re.sub(r"(?m)^(# .+)\n(?:\n\[!\[Open in Colab\].*\n)?", rf"\1\n\n{badge}\n", text, count=1)
            return re.sub(r'(?m)^REPOSITORY = ".*?"', f'REPOSITORY = "{url}"', text)

        md, nb = path.with_suffix(".md"), read(path)
        text = md.read_text("utf-8")
        if (new := addressed(text)) == text:
            continue
        whole = read(md)
        md.write_text(new, "utf-8")
        for cell, old, now in zip(nb.cells, whole.cells, read(md).cells, strict=True):
            if old.source != now.source:
                cell.source = now.source
        write(nb, path)
        changed += [md, path]
    return changed


def handout(notebooks: list[Path], folder) -> list[Path]:
    """Copies for a class: without outputs, and with an empty cell in place of each solution. Hints stay."""
    import jupytext

    folder, copies = Path(folder), {}
    for path in notebooks:
        text = SOLUTION.sub(ANSWER, path.with_suffix(".md").read_text("utf-8"))
        if "{admonition} Solution" in text:
            raise PgsegError(f"{path.with_suffix('.md')}: a solution has no end; close it with a line that is only :::")
        copies[folder / path.name] = jupytext.reads(text, fmt="md:myst")
    if there := next(filter(Path.exists, copies), None):
        raise PgsegError(f"{there} is there already and may hold somebody's answers; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, nb in copies.items():
        write(nb, path)
    return list(copies)


def run(notebook: Path, target: Path, profile: str) -> tuple[str, float, str]:
    """One notebook, in a process of its own; what kernels say outside the cells goes to NAME.log."""
    import papermill

    os.dup2(os.open(target.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    start, error = time.perf_counter(), ""
    parameters = {} if profile == "lite" else {"PROFILE": profile}  # lite is what the cell itself says
    options = {"kernel_name": "python3", "progress_bar": False, "coalesce_streams": True, "cwd": target.parent}
    try:
        papermill.execute_notebook(notebook, target, parameters, **options)
    except Exception as exc:
        said = f"{getattr(exc, 'ename', type(exc).__name__)}: {getattr(exc, 'evalue', exc)}"
        error = f"{notebook.name}: {said}; the cell and its traceback are in {target}"
    return notebook.name, time.perf_counter() - start, error


def execute(notebooks: list[Path], profile="lite", output="_build/executed", jobs=1, keep=False) -> None:
    """Run the notebooks into `output`, `jobs` at a time; `keep` also stores the outputs in the sources."""
    if keep and profile != "lite":
        raise PgsegError(f"only outputs of the lite profile are kept, not those of {profile}; leave keep out")
    if problems := check_pairs(notebooks):
        raise PgsegError("\n".join(problems))
    shutil.rmtree(output := Path(output).resolve(), ignore_errors=True)
    output.mkdir(parents=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    targets = [output / path.name for path in notebooks]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for name, seconds, error in pool.map(run, notebooks, targets, repeat(profile)):
            print(f"  {name:40} {seconds:7.1f} s", flush=True)
            problems += [error] * bool(error)
    if problems:
        raise PgsegError("\n".join(problems))
    for path, target in zip(notebooks, targets, strict=True):
        write(read(target), path if keep else target)


def build(source=".", output=None, executed=None) -> Path:
    """Build the HTML with warnings as errors, from a copy in which `executed` notebooks can stand in."""
    source = Path(source).resolve()
    built = Path(output or source).resolve() / "_build"
    stage, html, log = built / "stage", built / "html", built / "book.log"
    for folder in (stage, html, built / ".doctrees", built / "jupyter_execute"):
        shutil.rmtree(folder, ignore_errors=True)
    stage.mkdir(parents=True)
    for path in filter(Path.exists, (source / name for name in STAGED)):
        shutil.copytree(path, stage / path.name) if path.is_dir() else shutil.copy(path, stage)
    for path in Path(executed).glob("*.ipynb") if executed else ():
        shutil.copy(path, stage / "notebooks")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", stage, "--path-output", built.parent]
    with log.open("w") as out:
        failed = subprocess.run([*command, "-W", "-n", "--keep-going"], stdout=out, stderr=out).returncode
    if failed:
        said = [line for line in log.read_text().splitlines() if "WARNING" in line or "ERROR" in line]
        raise PgsegError("\n".join([f"the book does not build without warnings; {log} says more", *said]))
    page_count(html, source)
    return html


def page_count(html: Path, source=".") -> int:
    """The number of pages, once it is sure that they are those of _toc.yml and no others."""
    from sphinx_external_toc.parsing import parse_toc_yaml

    wanted = set(parse_toc_yaml(Path(source) / "_toc.yml"))
    found = {path.relative_to(html).with_suffix("").as_posix() for path in html.glob("[!_]*/**/*.html")}
    if wanted != (found := found | {path.stem for path in html.glob("*.html")} - EXTRA_PAGES):
        raise PgsegError(f"the pages in {html} are not those of _toc.yml; they differ in {wanted ^ found}")
    return len(wanted)
