"""What all tests share: where things are, what to do without them, and how long each stage took."""

import os
from collections import defaultdict
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
STAGES = ("papermill", "nbval", "book", "browser")  # markers; all other tests are unit tests

# `make test` runs a worker for each core: without this, each of them and each notebook would start a thread for each.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(workers))))


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the public data sets; tests that need it are skipped where it is not."""
    root = Path(os.environ.get("PGSEG_DATA") or REPO.parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no data sets at {root}; set PGSEG_DATA to the folder that holds CoNSeP, Kumar and cpm15")
    return root


@pytest.fixture(scope="session")
def browser():
    from browser import Browser, find_chromium

    binary = find_chromium()
    if binary is None:
        reason = "no Chromium on the PATH, so no page was opened; install one (Debian: apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    opened = Browser(binary)
    yield opened
    opened.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One worker builds the pages and opens them, and one takes a file, so that no fixture is made twice.

    The chapters are the longest tests by far and have nothing in common, so each of theirs goes by itself.
    """
    for item in items:
        if any(item.get_closest_marker(name) for name in ("book", "browser")):
            item.add_marker(pytest.mark.xdist_group("pages"))
        elif item.path.stem != "test_notebooks":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_terminal_summary(terminalreporter):
    """The seconds of each stage, just above pytest's closing line."""
    seconds, tests = defaultdict(float), defaultdict(int)
    for reports in terminalreporter.stats.values():
        for report in (r for r in reports if isinstance(r, pytest.TestReport)):
            stage = next((name for name in STAGES if name in report.keywords), "unit")
            seconds[stage] += report.duration
            tests[stage] += report.when == "call"
    terminalreporter.section("how long each stage took", sep="-")
    for stage in sorted(seconds, key=("unit", *STAGES).index):
        terminalreporter.write_line(f"{stage:10} {tests[stage]:5} tests {seconds[stage]:8.1f} s")
