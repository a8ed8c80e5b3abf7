"""Gate in pytest: a marker says bank, images and limits, the fixture asks the model. Nothing heavy loads before that.

    @pytest.mark.prompt_bank("our_bank.yaml", images="tests/tiles", baseline="tests/baseline.json", max_drop=0.02)
    def test_wording(prompt_bank):
        prompt_bank.check("my_package.serve:segment")  # or a Python function, a segmenter, a command, a URL

In place of `images`, `data=` takes a dataset from `load_dataset`. The rest of the marker's keywords are those of
`measure` (levels, per_level, split, folder) and of `check_gates` (max_drop, max_spread, max_failures). Paths are
relative to pytest's root. To store the baseline: `pytest --prompt-bank-save`.
"""

from pathlib import Path

import pytest

MARKER = "prompt_bank(bank, *, images, data, baseline, ...): ask a segmenter in all phrasings of a bank, and gate on it"
GATES = ("max_drop", "max_spread", "max_failures")
KNOWN = (*GATES, "images", "data", "baseline", "tile", "levels", "per_level", "split", "folder")


def pytest_addoption(parser):
    group = parser.getgroup("prompt_bank", "prompt regression")
    group.addoption("--prompt-bank-save", action="store_true", help="store the baselines of prompt_bank markers anew")


def pytest_configure(config):
    config.addinivalue_line("markers", MARKER)


@pytest.fixture
def prompt_bank(request):
    """What the marker describes; its `check(model, ...)` measures and fails the test where a gate fails."""
    marker = request.node.get_closest_marker("prompt_bank")
    if marker is None or len(marker.args) != 1:
        pytest.fail(
            "the fixture prompt_bank needs @pytest.mark.prompt_bank(BANK, images=...) on its test", pytrace=False
        )
    if unknown := [name for name in marker.kwargs if name not in KNOWN]:
        pytest.fail(f"prompt_bank has no {unknown[0]!r}; it has {', '.join(KNOWN)}", pytrace=False)
    config = request.config
    return MarkedBank(marker.args[0], dict(marker.kwargs), config.rootpath, config.getoption("--prompt-bank-save"))


class MarkedBank:
    def __init__(self, bank, options, root, save):
        self.name, self.options, self.root, self.save = bank, options, root, save

    def check(self, model, **how):
        """The Report of a model, once no gate failed; `how` are the keywords of `adapt`."""
        __tracebackhide__ = True
        from ..errors import PgsegError

        try:
            report = self.report(model, **how)
        except PgsegError as error:
            pytest.fail(str(error), pytrace=False)
        if not report.passed:
            pytest.fail("\n".join([report.verdict, *(check.reason for check in report.failed)]), pytrace=False)
        return report

    def report(self, model, **how):
        from ..errors import SettingsError
        from ..options import check_file
        from ..prompts import PromptBank
        from . import Report, adapt, check_gates, load_baseline, measure, open_pictures, save_baseline
        from .gates import check_before

        options = dict(self.options)
        images, data, tile = options.pop("images", None), options.pop("data", None), options.pop("tile", 256)
        if (images is None) == (data is None):
            raise SettingsError("prompt_bank needs one of images= (a folder) and data= (a dataset)")
        stored = options.pop("baseline", None)
        if stored and self.save:
            check_file(self.root / stored, "the baseline")
        limits = {name: options.pop(name) for name in GATES if name in options}
        if "folder" in options:
            options["folder"] = self.root / options["folder"]
        own = self.root / self.name
        bank = PromptBank.load(own if own.is_file() else self.name)
        data = open_pictures(self.root / images, tile) if data is None else data
        before = load_baseline(self.root / stored) if stored and not self.save else None
        check_before(data, before, **limits)
        result = measure(adapt(model, **how), data, bank, quiet=True, **options)
        checks = check_gates(result, before, **limits)
        if stored and self.save:
            save_baseline(result, Path(self.root / stored))
        return Report(result, checks)
