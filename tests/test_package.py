"""The package and the checkout around it: light to import, small to read, locked, clean."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import pgseg_lite as pg


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def read_pins(path: Path) -> dict[str, Requirement]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


@pytest.fixture(scope="module")
def project(repo) -> dict:
    return tomllib.loads((repo / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def files(repo) -> list[Path]:
    """What git tracks, or would track if it were added now."""
    command = ["git", "-C", repo, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of its files")
    return [path for name in listed.stdout.split("\0") if name and (path := repo / name).is_file()]


def texts(files: list[Path]):
    for path in files:
        try:
            yield path, path.read_text()
        except UnicodeDecodeError:
            continue


# ---- the module ----


@pytest.mark.parametrize("name", pg.__all__)
def test_public_name_resolves(name):
    assert getattr(pg, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        pg.no_such_name  # noqa: B018


def test_import_is_light():
    heavy = ("torch", "transformers", "matplotlib", "pandas", "scipy", "PIL")
    assert run(f"import sys, pgseg_lite; print(sorted(sys.modules.keys() & {set(heavy)}))") == "[]"


def test_module_can_be_read_in_an_evening(repo):
    """The engine, from phrasings and images to records, has under 3,000 lines with something on them; no file is long.

    What stands on it (experiments, claims, pictures, commands, getting data, costs, the book's machinery) is read when
    it is needed, and so are the baselines: models of others, made to answer as ours do.
    """
    on_top = {
        "experiments",
        "runner",
        "keys",
        "tables",
        "claims",
        "plots",
        "widgets",
        "cli",
        "options",
        "download",
        "cost",
        "book",
        "paper",
        "results",
        "lint",
        "sam2",
        "visual",  # the baselines of models/, and the package of bent visual prompts
        "studies",
        "reasoning",
        "regression",
        "evolve",
        "clipseg",
        "grounding_dino",
        "grounded_sam2",
        "preferences",
    }
    lines = {
        path: sum(map(bool, map(str.strip, path.read_text().splitlines())))
        for path in (repo / "pgseg_lite").rglob("*.py")
    }
    assert sum(count for path, count in lines.items() if not {path.stem, path.parent.name} & on_top) < 3000
    assert not {str(path): count for path, count in lines.items() if count > 300}


def test_nothing_imports_the_command_line(repo):
    importing = re.compile(r"(from \.+|from \.+ import .*|pgseg_lite\.)\b(cli|widgets)\b")
    assert not [p for p in (repo / "pgseg_lite").rglob("*.py") if p.stem != "cli" and importing.search(p.read_text())]


def test_every_command_has_help(repo):
    for command in ([], ["train"], ["evaluate"], ["experiment"], ["prompts"], ["data"], ["book"], ["book", "execute"]):
        shown = subprocess.run(
            [sys.executable, "-m", "pgseg_lite.cli", *command, "--help"], capture_output=True, text=True
        )
        assert shown.returncode == 0 and "usage: pgseg" in shown.stdout, (command, shown.stderr)


def test_package_data_is_declared_for_every_file_that_is_not_code(repo, files):
    patterns = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pgseg_lite"]
    shipped = {path for pattern in patterns for path in (repo / "pgseg_lite").glob(pattern)}
    needed = {p for p in files if p.is_relative_to(repo / "pgseg_lite") and p.suffix != ".py"}
    assert needed <= shipped


# ---- versions ----


def test_lock_has_exact_pins_and_nothing_of_one_machine(repo):
    pins = read_pins(repo / "requirements.txt")
    for name, pin in pins.items():
        (spec,) = pin.specifier
        assert spec.operator == "==" and not pin.url and not Version(spec.version).local, name
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]
    assert not re.search(r"://|^-|[\\@]|^[./]", (repo / "requirements.txt").read_text(), re.M)


def test_lock_is_the_environment_that_runs_these_tests(repo):
    from importlib.metadata import version

    pins = read_pins(repo / "requirements.txt")
    other = {name: version(name) for name, pin in pins.items() if not pin.specifier.contains(version(name))}
    assert not other, "this environment is not the locked one; run the tests with `make test`"


def test_lock_satisfies_the_project(repo, project):
    pins = read_pins(repo / "requirements.txt")
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    for need in map(Requirement, project["dependencies"] + extras):
        (spec,) = pins[canonicalize_name(need.name)].specifier
        assert need.specifier.contains(spec.version), f"{need} but {spec} is locked"


def test_lower_bounds_fit_colab(repo, project):
    colab = read_pins(repo / "constraints-colab.txt")
    for need in map(Requirement, project["dependencies"] + project["optional-dependencies"]["sam3"]):
        assert {spec.operator for spec in need.specifier} == {">="}, f"{need}: lower bounds only"
        (spec,) = colab[canonicalize_name(need.name)].specifier
        assert need.specifier.contains(spec.version), f"{need} but Colab has {spec}"


def test_a_resolver_installs_the_module_beside_colab_s_versions(repo, tmp_path):
    """As `make colab-check` does; a machine without a package index has no resolver to ask."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--system-certs", "--extra", "sam3"]
    command += ["--python-version", "3.13", "--constraint", "constraints-colab.txt", "pyproject.toml"]
    found = subprocess.run(
        [*command, "--output-file", tmp_path / "colab.txt"], cwd=repo, capture_output=True, text=True
    )
    if found.returncode and "No solution found" not in found.stderr:
        pytest.skip(f"no package index here: {found.stderr.strip().splitlines()[-1]}")
    assert found.returncode == 0, found.stderr
    colab, resolved = read_pins(repo / "constraints-colab.txt"), read_pins(tmp_path / "colab.txt")
    assert {"torch", "numpy", "pandas", "ipywidgets", "peft"} <= {*resolved}
    kept = {*resolved} & {*colab}
    assert {name: resolved[name].specifier for name in kept} == {name: colab[name].specifier for name in kept}


# ---- the checkout ----


def test_no_file_is_large(files):
    assert not {str(path): path.stat().st_size for path in files if path.stat().st_size > 5_500_000}


def test_no_data_set_is_committed(repo, files):
    suffixes = {".mat", ".npy", ".npz", ".tif", ".tiff", ".h5", ".pt", ".pth", ".pkl"}
    assert not [path for path in files if path.suffix.lower() in suffixes]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert all(path.is_relative_to(repo / "pgseg_lite" / "checkpoints") for path in weights)


def test_no_path_of_one_machine_is_committed(files):
    home = re.compile(r"(?<![\w.<~-])/(home|Users|root|work|tmp/dev)/(?!me/)\w")  # /home/me/ is anybody's
    found = [f"{path}: {hit.group()}" for path, text in texts(files) for hit in home.finditer(text)]
    assert not found


def test_every_result_has_a_stamp(repo):
    for table in (repo / "results").glob("*.csv"):
        stamp = json.loads(table.with_suffix(".json").read_text())
        assert isinstance(stamp, dict) and stamp, table


def test_every_command_of_the_readme_exists(repo):
    targets = set(re.findall(r"^([a-z-]+):", (repo / "Makefile").read_text(), re.M))
    pages = [repo / "README.md", *(repo / "book").glob("*.md")]
    used = {name for page in pages for name in re.findall(r"\bmake ([a-z-]+)\b(?= |`|\n)", page.read_text())}
    assert {"book", "test"} <= used <= targets


def make(repo, *words, cwd=None):
    if not shutil.which("make"):
        pytest.skip("there is no make here")
    command = ["make", "--no-print-directory", "-f", repo / "Makefile", *words]
    return subprocess.run(command, cwd=cwd or repo, capture_output=True, text=True, check=True).stdout


def test_make_clean_keeps_what_took_days(repo, tmp_path):
    kept = {f"_build/{name}/model.safetensors" for name in ("experiments", "checkpoints", "consep")}
    for name in (*kept, "_build/html/index.html", "_build/book.log", "build/lib/x.py", "sub/__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    make(repo, "clean", cwd=tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_make_experiments_leaves_the_jobs_to_the_command_unless_they_are_given(repo):
    """By default a run for each GPU. The three studies of neighbouring systems have none to choose."""
    assert "--jobs" not in make(repo, "-n", "experiments")
    loops = [line for line in make(repo, "-n", "experiments", "JOBS=3").splitlines() if "pgseg experiment" in line]
    assert ["--jobs 3" in line for line in loops] == ["preferences" not in line for line in loops] == [True, False]
    assert "--jobs 1" in make(repo, "-n", "book") and "--jobs 3" in make(repo, "-n", "book", "JOBS=3")


def test_the_readme_example_runs(repo):
    (example,) = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), re.S)
    assert "worst_phrasing" in run(example)
