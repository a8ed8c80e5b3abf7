"""Bad input to `pgseg robustness`: each case with its message, status 2 for what is wrong from the start."""

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from regression_models import BANK, Service, painted, served

import pgseg_lite as pg
from pgseg_lite.cli import main
from pgseg_lite.errors import ModelError, ResultError, SettingsError
from pgseg_lite.regression import adapt, check_gates, load_baseline, measure, open_pictures, processes, save_baseline
from pgseg_lite.regression.gates import check_before

HERE = Path(__file__).parent
COMMAND = f"{sys.executable} -S -c"


def dark(image, phrasing):
    """Moves with words enough to be no deaf model."""
    return image[..., 0] < 60 + 20 * (len(phrasing) % 7)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Images, a bank, a baseline of them, and spoiled copies of each."""
    folder = tmp_path_factory.mktemp("site")
    data = painted(folder / "data", count=7, side=64)
    (folder / "bank.yaml").write_text(BANK)
    bank = pg.PromptBank.load(folder / "bank.yaml")
    result = measure(adapt(dark), data, bank, per_level=1, quiet=True)
    save_baseline(result, folder / "good.json")
    good = json.loads((folder / "good.json").read_text())
    without = {key: value for key, value in good.items() if key != "items"}
    short = {**good, "per_item": {**good["per_item"], "dice": good["per_item"]["dice"][:-1]}}
    words = {**good, "per_item": {**good["per_item"], "dice": [["high"]]}}
    masks = json.loads(json.dumps(good))
    masks["per_target"]["area_true"][0][0] += 0.01
    blind = {**good, "about": {**good["about"], "truth": False}}
    others = {**good, "images": {name: "0" * 24 for name in good["images"]}}
    asked = {**good, "items": [[target, level, split, text + "?"] for target, level, split, text in good["items"]]}
    for name, content in dict(
        newer={**good, "schema": 3}, older={**good, "schema": None}, list=[good], other={"kind": "coverage"},
        without=without, short=short, words=words, masks=masks, blind=blind, others=others, asked=asked,
    ).items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "cut.json").write_text((folder / "good.json").read_text()[:500])
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    pictures = {
        "deep": Image.fromarray(np.zeros((32, 32), np.uint16)),
        "float": Image.fromarray(np.zeros((32, 32), np.float32)),
        "clear": Image.fromarray(np.zeros((32, 32, 4), np.uint8)),
    }
    for name, picture in pictures.items():
        (folder / name).mkdir()
        picture.save(folder / name / ("a.tif" if name == "float" else "a.png"))
    for name, file, content in (
        ("empty", None, b""), ("text", "notes.txt", b"no image"), ("broken", "a.png", b"\x89PNG\r\n\x1a\nxx"),
        ("twice", "a.png", b""),
    ):  # fmt: skip
        (folder / name).mkdir()
        if file:
            (folder / name / file).write_bytes(content)
    (folder / "twice" / "a.jpg").write_bytes(b"")
    (folder / "pages").mkdir()
    page = Image.fromarray(np.zeros((8, 8), np.uint8))
    page.save(folder / "pages" / "a.tif", save_all=True, append_images=[page])
    (folder / "glands.yaml").write_text("targets: {glands: {fixed: glands, phrasings: {low: [glands]}}}")
    (folder / "low.yaml").write_text("targets: {all: {fixed: nuclei, phrasings: {low: [nuclei]}}}")
    (folder / "bad.yaml").write_text("targets: {all: {phrasings: {low: [nuclei]}}}")
    (folder / "broken.yaml").write_text("targets: [")
    (folder / "answers").mkdir()
    (folder / "answers" / "answers.sqlite").write_bytes(b"this is no database, but long enough to be read as one" * 9)
    (folder / "file").write_text("")
    (folder / "broken_model.py").write_text("import no_such_module")
    (folder / "quitting_model.py").write_text("import os; os._exit(3)")
    (folder / "plain_model.py").write_text("weights = 1")
    (folder / "hanging_model.py").write_text("import time; time.sleep(60)")
    return folder


MINE = "--model regression_models:odd --images {site}/data/images --bank {site}/bank.yaml --per-level 1"
TRUE = "--model regression_models:odd --dataset folder --root {site}/data --split all --tile 0 --bank {site}/bank.yaml"

FROM_THE_START = [
    # the bank
    ("--images {site}/data/images --bank {site}/none.yaml", "none.yaml: no such file; give a YAML file or a bundled bank"),
    ("--images {site}/data/images --bank {site}/bad.yaml", "targets.all.fixed is missing"),
    ("--images {site}/data/images --bank {site}/broken.yaml", "broken.yaml, line 1: not a valid bank"),
    (f"{TRUE} --bank {{site}}/glands.yaml", "share no target: the dataset has all, epithelial, inflammatory and the bank"),
    (f"{TRUE} --bank {{site}}/low.yaml --levels high", "has no phrasings of 'all' at high; add some"),
    (f"{MINE} --phrasings heldout", "has no heldout phrasings of 'all' at low, medium, high; add some"),
    (f"{MINE} --per-level -1", "per_level is -1; it must be at least 1, or None for all phrasings"),
    (f"{MINE} --levels lowest", "invalid choice: 'lowest'"),
    # the model
    ("--model lightweight --images {site}/data/images", "'lightweight' names no model; give one of lite, sam3"),
    ("--model lite --checkpoint {site}/absent --images {site}/data/images", "absent: no such checkpoint folder"),
    (f"{MINE} --checkpoint group", "a checkpoint is for lite, sam3"),
    ("--model sam2 --checkpoint {site}/absent", "sam2 reads no words: it is shown the true nuclei"),
    ("--model medsam --checkpoint {site}/absent", "medsam reads no words"),
    ("--model lite --option truncate=true --images {site}/data/images", "lite has no option 'truncate'; it has none"),
    (f"{MINE} --option truncate=true", "options such as truncate are for lite, sam3, clipseg, grounded-sam2, seg-zero"),
    (f"{MINE} --timeout 0", "timeout is 0.0; give seconds above zero"),
    (f"{MINE} --retries -1", "retries is -1 and workers 4; use retries >= 0 and 1 to 64 workers"),
    (f"{MINE} --workers 0", "retries is 3 and workers 0"),
    ("--model absent_model:f --images {site}/data/images", "absent_model:f cannot be loaded (ModuleNotFoundError"),
    ("--model broken_model:f --images {site}/data/images", "(ModuleNotFoundError: No module named 'no_such_module')"),
    ("--model quitting_model:f --images {site}/data/images", "cannot be loaded (its process ended at once)"),
    ("--model plain_model:f --images {site}/data/images", "has no attribute 'f'"),
    ("--model plain_model:weights --images {site}/data/images", "weights is a int, not a function"),
    ("--model http:// --images {site}/data/images", "http://: names no host; write http://host:port/path"),
    ("--model http://[bad --images {site}/data/images", "http://[bad: not a URL (Invalid IPv6 URL); correct it"),
    ("--model http://host:port/ --images {site}/data/images", "http://host:port/: not a URL"),
    ("--model https://me:word@host/ --images {site}/data/images", "the URL holds a name or password"),
    ("--model http://127.0.0.1:9/ --retries 0 --images {site}/data/images", "the endpoint cannot be reached"),
    # the images
    ("--model regression_models:odd --images {site}/nowhere", "nowhere: no such folder of images; correct --images"),
    ("--images {site}/empty", "looked for png, tif, jpg or bmp and found nothing; add images"),
    ("--images {site}/text", "looked for png, tif, jpg or bmp and found notes.txt; add images"),
    ("--images {site}/broken", "a.png: no readable image"),
    ("--images {site}/deep", "a.png: more than 8 bits a channel"),
    ("--images {site}/float", "a.tif: more than 8 bits a channel"),
    ("--images {site}/clear", "a.png: 100.0% of its pixels are transparent"),
    ("--images {site}/pages", "a.tif: holds 2 pages"),
    ("--images {site}/twice", "has the same name; rename one of them"),
    ("--images {site}/data/images --root {site}", "--images measures a whole folder and takes no --root; leave it out"),
    ("--images {site}/data/images --dataset consep --split train", "takes no --dataset, --split; leave it out"),
    ("--images {site}/data/images --fraction 0.1 --data-seed 1 --size 3", "takes no --fraction, --data-seed, --size;"),
    ("--images {site}/data/images --shift blur --annotations a.json --hub", "takes no --shift, --annotations, --hub;"),
    ("--dataset sea", "there is no dataset 'sea'"),
    # the baseline
    (f"{TRUE} --against {{site}}/none.json", "none.json: no baseline here (No such file or directory); store one with"),
    (f"{TRUE} --against {{site}}", ": no baseline here (Is a directory)"),
    (f"{TRUE} --against {{site}}/cut.json", "cut.json: not valid JSON"),
    (f"{TRUE} --against {{site}}/binary.json", "binary.json: not valid JSON"),
    (f"{TRUE} --against {{site}}/list.json", "list.json: not a baseline of pgseg robustness"),
    (f"{TRUE} --against {{site}}/other.json", "other.json: not a baseline of pgseg robustness"),
    (f"{TRUE} --against {{site}}/newer.json", "newer.json: it has schema 3 and this version reads 2; store it again"),
    (f"{TRUE} --against {{site}}/older.json", "older.json: it has schema None and this version reads 2"),
    (f"{TRUE} --against {{site}}/without.json", "without.json: a damaged baseline (KeyError: 'items'); store it again"),
    (f"{TRUE} --against {{site}}/short.json", "short.json: a damaged baseline (ValueError"),
    (f"{TRUE} --against {{site}}/words.json", "words.json: a damaged baseline (ValueError"),
    (f"{TRUE} --against {{site}}/others.json", "others.json: none of its images is in this run; measure the images"),
    (f"{MINE} --against {{site}}/good.json", "good.json: measured with true masks, this run without masks; measure both"),
    # limits, outputs and the folder
    (f"{TRUE} --max-drop -0.1", "max_drop is -0.1; give a number of at least 0"),
    (f"{TRUE} --max-spread nan", "max_spread is nan; give a number of at least 0"),
    (f"{TRUE} --max-failures -1", "max_failures is -1; give a number of at least 0"),
    (f"{TRUE} --save {{site}}/nowhere/b.json", "nowhere: no such folder for --save; create it first"),
    (f"{TRUE} --html {{site}}/nowhere/b.html", "nowhere: no such folder for --html; create it first"),
    (f"{TRUE} --junit {{site}}/empty", "empty: a folder; name a file in it for --junit"),
    (f"{MINE} --folder {{site}}/answers", "answers.sqlite: cannot be used to keep answers (file is not a database)"),
    (f"{MINE} --folder {{site}}/file", "no folder for the answers"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), FROM_THE_START)
def test_what_is_wrong_from_the_start_ends_with_2_and_one_sentence(site, capsys, monkeypatch, arguments, message):
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.syspath_prepend(site)
    before = sorted(site.rglob("*.json"))
    try:
        status = main(["robustness", "--device", "cpu", *arguments.format(site=site).split()])
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error, error
    assert "Traceback" not in error and sorted(site.rglob("*.json")) == before


def test_a_module_whose_import_does_not_end_is_ended(site, capsys, monkeypatch):
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(processes, "LOADING", 2.0)
    words = f"robustness --model hanging_model:f --timeout 1 --images {site}/data/images --bank {site}/bank.yaml"
    before = time.monotonic()
    assert main(words.split()) == 2 and time.monotonic() - before < 50  # the import takes 60
    assert "hanging_model:f cannot be loaded (its import does not end within 2 s)" in capsys.readouterr().err


PIECES = [
    ("{image} {phrasing}", "has no {output}; it needs {image}, {phrasing}, {output}"),
    ("tool {phrasing} {output}", "has no {image}"),
    ("tool {image} {output}", "has no {phrasing}"),
    (
        "no-such-tool {image} {phrasing} {output}",
        "the command 'no-such-tool' is not found; give its path, or install it",
    ),
    ("tool '{image} {phrasing} {output}", "cannot be read (No closing quotation); close its quotes"),
]


@pytest.mark.parametrize(("command", "message"), PIECES)
def test_a_command_that_cannot_be_started(command, message):
    with pytest.raises(ModelError) as found:
        adapt(command)
    assert message in str(found.value)


RUNS = [
    ("import sys; sys.exit('no weights')", "the command ended with status 1: no weights"),
    ("pass", "the command wrote no mask; it must write an image file to {output}"),
    ("import sys; open(sys.argv[3], 'w').write('mask')", "the mask is no readable image of one page; write it as PNG"),
    ("import time; time.sleep(9)", "no answer within 1 s"),
    ("import shutil, sys; shutil.copy(sys.argv[1], sys.argv[3])", "returned uint8 of shape [16, 16, 3]; it must be one mask"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "reason"), RUNS)
def test_a_command_that_fails_an_item(code, reason):
    assert reason == reason_of(adapt(f'{COMMAND} "{code}" {{image}} {{phrasing}} {{output}}', timeout=1))[: len(reason)]


def reason_of(model):
    sample = pg.Sample(np.zeros((16, 16, 3), np.uint8), {}, "one", "black")
    ((_, answer),) = model.answers(sample, ["every {output} of $HOME; `date`"])
    assert answer.packed is None
    return answer.reason


REPLIES = [
    ("/html", "the reply is text/html; answer with image/png, or JSON with the field mask"),
    ("/not-json", "the JSON reply has no base64 PNG in its field mask (Expecting property name"),
    ("/no-mask", "the JSON reply has no base64 PNG in its field mask (no 'mask')"),
    ("/error", "the endpoint reports: no GPU left"),
    ("/not-base64", "the JSON reply has no base64 PNG in its field mask"),
    ("/not-png", "the mask is no readable image of one page; write it as PNG"),
    *((f"/to-{status}", "the endpoint redirects to http://localhost:") for status in (301, 302, 303, 307, 308)),
    ("/refused", "the endpoint answers 400: phrasing too long"),
    ("/always-busy", "the endpoint answers 503: overloaded (asked 2 times)"),
    ("/token", "the endpoint answers 401: no token"),
    ("/short", "the endpoint cannot be reached (IncompleteRead"),
    ("/slow", "no answer within 0.5 s (asked 2 times)"),
    ("/trickle", "no answer within 0.5 s (asked 2 times)"),
]


@pytest.fixture(scope="module")
def address():
    with served() as address:
        yield address


@pytest.mark.parametrize(("path", "reason"), REPLIES)
def test_an_endpoint_that_fails_an_item(address, path, reason, monkeypatch):
    monkeypatch.delenv("PGSEG_TOKEN", raising=False)
    assert reason == reason_of(adapt(address + path, timeout=0.5, retries=1))[: len(reason)]


def test_a_redirect_takes_neither_the_token_nor_the_request_along(address, monkeypatch):
    monkeypatch.setenv("PGSEG_TOKEN", "secret")
    reason = reason_of(adapt(f"{address}/to-302", retries=3))
    assert reason.endswith("/moved; give that URL") and "secret" not in reason
    assert not Service.got and not [path for path in Service.failures if path.startswith("/moved")]


COMPARED = [
    ("others", "none of its images is in this run; measure the images of the baseline"),
    ("asked", "has no phrasing of this run's bank; measure with the baseline's bank, or store anew"),
    ("blind", "measured without masks, this run with true masks; measure both alike"),
    ("masks", "the true masks of 0 have changed; store it anew"),
]


@pytest.fixture(scope="module")
def measured(site):
    data = pg.load_dataset("folder", site / "data", "all", tile=None)
    return measure(adapt(dark), data, pg.PromptBank.load(site / "bank.yaml"), per_level=1, quiet=True)


@pytest.mark.parametrize(("name", "message"), COMPARED)
def test_a_baseline_that_cannot_be_compared(site, measured, name, message):
    with pytest.raises(ResultError) as found:
        check_gates(measured, load_baseline(site / f"{name}.json"))
    assert str(found.value) == f"{site / name}.json: {message}"


def test_a_baseline_of_its_own_run_compares(site, measured):
    drops = [c for c in check_gates(measured, load_baseline(site / "good.json")) if c.gate == "drop"]
    known = [c for c in drops if not np.isnan(c.estimate)]
    assert known and all(c.outcome == "pass" and abs(c.estimate) < 1e-4 for c in known)
    rare = [c for c in drops if np.isnan(c.estimate)]
    assert rare and all(c.outcome == "undecided" and c.reason.endswith("fewer than 6 images in common") for c in rare)


def test_without_masks_only_the_same_phrasings_are_compared(site, tmp_path):
    bank, data = pg.PromptBank.load(site / "bank.yaml"), open_pictures(site / "data" / "images", tile=None)
    save_baseline(measure(adapt(dark), data, bank, per_level=2, quiet=True), tmp_path / "b.json")
    with pytest.raises(ResultError, match="has other phrasings, and without masks only the same can be compared"):
        check_gates(measure(adapt(dark), data, bank, per_level=1, quiet=True), load_baseline(tmp_path / "b.json"))


def test_too_few_images_for_a_gate(site, tmp_path):
    data = pg.load_dataset("folder", site / "data", "all", fraction=0.3, tile=None)
    result = measure(adapt(dark), data, pg.PromptBank.load(site / "bank.yaml"), per_level=1, quiet=True)
    message = "a gate needs at least 6 images in common, and there are 2; add images"
    with pytest.raises(ResultError, match=message):
        check_gates(result, load_baseline(site / "good.json"))
    with pytest.raises(ResultError, match=message):
        check_gates(result, max_spread=0.1)


def test_what_is_known_before_is_known_from_the_first_images(site):
    class Counted(list):
        targets, read = ("all",), 0

        def __iter__(self):
            for sample in super().__iter__():
                self.read += 1
                yield sample

    data = Counted(pg.load_dataset("folder", site / "data", "all", tile=None))
    check_before(data, load_baseline(site / "good.json"))
    assert data.read == 6 < len(data)


def test_too_few_images_are_said_before_a_model_is_asked_and_when_a_baseline_is_stored(site, tmp_path, capsys):
    asked = f"robustness --device cpu --dataset folder --root {site}/data --split all --tile 0 --fraction 0.3 --bank {site}/bank.yaml"
    assert main([*asked.split(), "--against", f"{site}/good.json", "--folder", f"{tmp_path}/kept"]) == 2
    assert "a gate needs at least 6 images in common, and there are 2; add images" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
    main([*asked.split(), "--per-level", "1", "--save", f"{tmp_path}/small.json"])
    said = capsys.readouterr()
    assert f"{tmp_path}/small.json: holds 2 images, and --against needs 6; add some" in said.err
    assert "9 of 18 phrasings of bank " in said.out


def test_a_model_that_is_not_there_is_not_asked_ten_thousand_times(site):
    asked, workers = [], 3

    class Gone:
        name, fingerprint = "gone", "gone"

        @contextmanager
        def asking(self, image):
            def ask(phrasing):
                asked.append(phrasing)
                raise ConnectionError("the licence has run out")

            yield ask

    model, bank = Gone(), pg.PromptBank.load("nuclei")
    model.workers = workers
    data = open_pictures(site / "data" / "images", tile=None)
    with pytest.raises(
        ModelError, match=r"first 20 items all failed; the last was .*: ConnectionError: the licence has"
    ):
        measure(adapt(model), data, bank, quiet=True)
    assert 20 <= len(asked) < 20 + 2 * workers  # those under way, and no more


def test_a_model_that_goes_in_the_middle_ends_the_run_and_loses_nothing(site, tmp_path):
    bank, data = pg.PromptBank.load(site / "bank.yaml"), open_pictures(site / "data" / "images", tile=None)
    asked, lasts = [], [30]

    def goes(image, phrasing):
        asked.append(phrasing)
        if len(asked) > lasts[0]:
            raise ConnectionError("gone")
        return dark(image, phrasing)

    with pytest.raises(ModelError, match=r"3 images in a row were not answered at all; .* what was answered is kept"):
        measure(adapt(goes, version="1"), data, bank, per_level=1, quiet=True, folder=tmp_path)
    assert len(asked) == (3 + 3) * 12  # two and a half images answered, three not
    lasts[0] = 1000
    result = measure(adapt(goes, version="1"), data, bank, per_level=1, quiet=True, folder=tmp_path)
    assert result.kept == 30 and result.failures.empty and len(asked) == 72 + 7 * 12 - 30
    other = measure(adapt(goes, version="2"), data, bank, per_level=1, quiet=True, folder=tmp_path)
    assert other.kept == 0  # the answers of one version are not those of another


def test_options_of_the_module(site):
    with pytest.raises(SettingsError, match="timeout is -1; give seconds above zero"):
        adapt(dark, timeout=-1)
    with pytest.raises(ModelError, match="'8' names no model"):
        adapt(8)


def test_there_are_at_least_forty_cases():
    assert sum(map(len, (FROM_THE_START, PIECES, RUNS, REPLIES, COMPARED))) >= 40
