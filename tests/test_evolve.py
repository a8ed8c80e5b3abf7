"""Evolving a prompt: films, the gradient to a click, the score, the climb, the safeguard, wordings, the study."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pgseg_lite import paper, studies
from pgseg_lite.errors import DataError, ModelError, ResultError, SettingsError
from pgseg_lite.evolve import points, study, wording
from pgseg_lite.evolve.chest import TASK, load_films, open_films, phantoms
from pgseg_lite.evolve.promptable import Promptable, tiny, train_promptable
from pgseg_lite.evolve.regressor import Examples, Regressor, centroid, fit, level_sets, six_points, true_dice


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A few steps of training, saved and read back as a published checkpoint is."""
    folder = tmp_path_factory.mktemp("sam")
    train_promptable(phantoms("pretrain", 8), 12).save_pretrained(folder)
    return Promptable.from_pretrained(folder)


@pytest.fixture(scope="module")
def scene(model):
    return points.encode(model, phantoms("test", 4))


@pytest.fixture(scope="module")
def regressor(model, scene):
    return points.fit_on(model, [points.encode(model, phantoms("train", 4)), scene], 4, seed=0)


# ---- films ----


def test_a_painted_film_is_the_same_whatever_the_count_and_no_two_splits_share_one():
    few, many = phantoms("test", 2), phantoms("test", 3)
    assert all((a.image == b.image).all() for a, b in zip(few, many, strict=False))
    assert few.digest != phantoms("train", 2).digest and few.digest == phantoms("test", 2).digest
    with pytest.raises(DataError, match="no split 'exam'"):
        phantoms("exam", 1)


def test_structures_lie_where_anatomy_puts_them():
    for film in phantoms("train", 6):
        left, right = film.masks[TASK], film.masks["right lung"]
        assert centroid(left)[0] > centroid(right)[0]  # the patient's left is on the picture's right
        assert not (left & (right | film.masks["heart"])).any()
        assert ((left | right) == film.masks["both lungs"]).all()
        assert (film.masks["left upper zone"] ^ film.masks["left lower zone"] == left).all()
        assert film.image[left].mean() < film.image[film.masks["heart"]].mean()  # air is dark


def lay_out(root, count=6, lungs=("leftMask", "rightMask")):
    for folder in ("CXR_png", *(f"ManualMask/{lung}" for lung in lungs)):
        (root / folder).mkdir(parents=True)
    for k, film in enumerate(phantoms("train", count)):
        Image.fromarray(film.image).resize((70, 50)).save(root / "CXR_png" / f"MCUCXR_{k:04}_0.png")
        for lung, name in zip(lungs, (TASK, "right lung"), strict=False):
            Image.fromarray(film.masks[name]).resize((70, 50)).save(root / f"ManualMask/{lung}/MCUCXR_{k:04}_0.png")


def test_open_films_are_read_in_their_official_layout(tmp_path, monkeypatch, model):
    lay_out(tmp_path / "MontgomerySet")
    monkeypatch.setenv("PGSEG_DATA", str(tmp_path))
    parts = [load_films(split, 0, "full") for split in ("train", "val", "test")]
    ids = [film.id for part in parts for film in part]
    assert len(ids) == len(set(ids)) == 6 and all(map(len, parts))
    film = parts[0].films[0]
    assert film.image.shape == (1024, 1024) and film.masks[TASK].shape == (256, 256)
    assert centroid(film.masks[TASK])[0] > centroid(film.masks["right lung"])[0]
    scene = points.encode(model, parts[2])  # masks of another size than the film, and the film than the model's frame
    path = points.climb(model, Regressor(), scene, points.middles(scene), 1)
    assert scene.side == 256 and path.masks.shape[1:] == (len(parts[2]), 256, 256)


def test_films_that_are_missing_or_wrong_get_a_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("PGSEG_DATA", raising=False)
    with pytest.raises(DataError, match=r"no data given.*MontgomerySet"):
        open_films("test")
    lay_out(tmp_path / "films")
    (tmp_path / "films/ManualMask/leftMask/MCUCXR_0002_0.png").unlink()
    with pytest.raises(DataError, match=r"MCUCXR_0002_0.png has no mask of the left lung"):
        open_films("test", tmp_path / "films")
    Image.new("1", (70, 50)).save(tmp_path / "films/ManualMask/leftMask/MCUCXR_0002_0.png")
    with pytest.raises(DataError, match="the mask is empty"):
        [open_films(split, tmp_path / "films") for split in ("train", "val", "test")]
    lay_out(tmp_path / "two", count=2)
    with pytest.raises(DataError, match="2 films are too few"):
        open_films("test", tmp_path / "two")


# ---- the model and the gradient ----


def test_weights_that_are_not_there_get_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="no such checkpoint folder"):
        Promptable.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "sam2"}')
    with pytest.raises(ModelError, match="another model's checkpoint"):
        Promptable.from_pretrained(tmp_path)


def test_what_is_saved_answers_as_before(tmp_path, scene):
    model = tiny(3).eval()
    model.save_pretrained(tmp_path)
    again, clicks = Promptable.from_pretrained(tmp_path), points.middles(scene)[:, None]
    embedded = model.encode(torch.from_numpy(np.stack([film.image for film in phantoms("test", 4)])))
    own = points.Scene(scene.images, embedded, scene.truth)
    for before, after in zip(points.ask(model, own, clicks), points.ask(again, own, clicks), strict=True):
        assert np.allclose(before, after, atol=1e-5)


def test_frequencies_are_those_of_sam():
    """With transformers' own draw a click is aliased many times between two pixels, and nothing is learned from it."""
    assert 0.5 < tiny(0).sam.shared_image_embedding.positional_embedding.std() < 1.5


def test_the_gradient_reaches_the_click_and_equals_finite_differences(model, scene):
    sam, net = tiny(1).double().eval(), Regressor().double().eval()
    image, embedding = scene.images[:1].double(), torch.randn(1, 48, 8, 8, dtype=torch.float64)

    def score(click):
        logits, _ = sam.ask(embedding, click[None, None], 64)
        return points.score_of(net, image, logits[:, 0], slope=1.0)[0]

    click = torch.tensor([30.0, 25.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(score(click), click)
    with torch.no_grad():
        shifts = 1e-4 * torch.eye(2, dtype=torch.float64)
        numeric = torch.stack([(score(click + s) - score(click - s)) / 2e-4 for s in shifts])
    assert gradient.abs().max() > 0
    assert torch.allclose(gradient, numeric, rtol=1e-4, atol=1e-10)


# ---- the score ----


def test_level_sets_are_nested_half_too_small_and_half_too_large():
    truth = phantoms("train", 1).films[0].masks[TASK]
    sets = level_sets(truth, 8, np.random.default_rng(0))
    small, large = sets[:4], sets[4:]
    assert not (small & ~truth).any() and (large | ~truth).all()
    assert (np.diff(small.sum((1, 2))) <= 0).all() and (np.diff(large.sum((1, 2))) >= 0).all()
    assert true_dice(sets, truth).min() < 0.7 < true_dice(sets, truth).max()
    for bad in (np.zeros((8, 8), bool), np.ones((8, 8), bool)):
        with pytest.raises(SettingsError, match="need a border"):
            level_sets(bad, 4, np.random.default_rng(0))
        with pytest.raises(SettingsError, match="need a border"):
            six_points(bad, np.random.default_rng(0))


def test_three_clicks_are_in_the_bands_and_three_close_outside():
    for film in phantoms("train", 4):
        truth = film.masks[TASK]
        clicks = six_points(truth, np.random.default_rng(0))
        rows = np.flatnonzero(truth.any(1))
        assert (np.diff(clicks[:3, 1]) > len(rows) / 5).all()
        x, y = clicks[3:].astype(int).T
        assert not truth[y, x].any()


def test_the_regressor_learns_and_is_the_one_of_the_best_epoch(model, scene):
    films, source, masks, fits, sure = points.candidates(model, scene, seed=1)
    assert len(masks) == 4 * 22 and set(source) == {"level set", "click inside", "click outside"}
    assert np.isnan(sure).sum() == 4 * 16
    data = Examples(scene.images, *map(torch.from_numpy, (films, masks, fits.astype(np.float32))))
    net = fit(data, data, epochs=15, seed=0)
    guessed = study.score(net, *data.at(torch.arange(len(masks)))).numpy()
    assert np.corrcoef(guessed, fits)[0, 1] > 0.8
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in net.modules()) == 5
    with pytest.raises(SettingsError, match="epochs is 0"):
        fit(data, data, epochs=0)


# ---- the climb and its safeguard ----


def test_no_step_is_longer_than_adam_s_and_films_do_not_mix(model, regressor, scene):
    start = points.middles(scene)
    together = points.climb(model, regressor, scene, start, 2)
    first = np.abs(together.points[1] - together.points[0])
    assert (first > 0).all() and (first <= points.STEP * scene.side * 1.001).all()  # Adam: at most the step
    alone = points.climb(model, regressor, study.one(scene, 2), start[[2]], 2)
    assert np.allclose(alone.points[:, 0], together.points[:, 2], atol=1e-2)


def test_the_best_scored_click_is_kept(model, regressor, scene):
    path = points.climb(model, regressor, scene, points.middles(scene), 4)
    ends, masks = path.at(path.best)
    assert path.scores.shape == (5, 4) and masks.shape == (4, 64, 64)
    assert (path.scores.max(0) >= path.scores[0]).all()
    assert (ends == path.points[path.best, range(4)]).all()
    by_itself = points.climb(model, regressor, scene, points.middles(scene), 1, by="confidence")
    assert np.allclose(by_itself.scores, by_itself.confidence)


def test_a_climb_stays_in_the_film_and_refuses_what_makes_no_sense(model, regressor, scene):
    corner = np.zeros((4, 2), np.float32)
    path = points.climb(model, regressor, scene, corner, 3, step=0.5)
    assert path.points.min() >= 0 and path.points.max() <= 63
    bad = [dict(by="luck"), dict(steps=0), dict(step=0.0), dict(slope=-1.0)]
    for options in bad:
        with pytest.raises(SettingsError):
            points.climb(model, regressor, scene, corner, **{"steps": 1, **options})
    with pytest.raises(SettingsError, match="outside of its film"):
        points.climb(model, regressor, scene, corner + 64, 1)


def test_searching_begins_with_the_start_and_stays_in_its_mask(model, regressor, scene):
    start = points.middles(scene)
    path = points.search(model, regressor, scene, start, 5, np.random.default_rng(0))
    assert (path.points[0] == start).all() and path.scores.shape == (6, 4)
    for film in range(4):
        if path.masks[0, film].any():
            x, y = path.points[1:, film].astype(int).T
            assert path.masks[0, film][y, x].all()


def test_the_safeguard_breaks_for_the_right_reason():
    square, other = np.zeros((2, 8, 8), bool)
    square[:4], other[4:] = True, True
    before = {"masks": [square] * 4, "presence": np.full(4, 0.8), "agreement": np.full(4, 0.8)}
    after = {
        "masks": [square, other, square, square],
        "presence": np.array([0.8, 0.8, 0.7, 0.8]),
        "agreement": np.array([0.8, 0.8, 0.8, 0.7]),
    }
    broken = points.breaks(points.changes(before, after))
    assert broken.tolist() == [[False] * 3, [True, False, False], [False, True, False], [False, False, True]]
    assert points.shared(square, np.zeros_like(square)) == 0


# ---- wordings ----


def test_the_best_scored_wording_of_the_bank_is_chosen():
    import pgseg_lite as pg

    bank, model = pg.PromptBank.load("nuclei"), pg.load_segmenter("lite", "fixed", "cpu")
    data = pg.load_dataset("synthetic", split="train", size=1)
    texts = wording.inside_and_outside(bank, "all")
    assert len(texts) == 6 and all(p.target == "all" for p in bank.phrasings if p.text in texts[:3])
    net = wording.fit_on([model], data, data, bank, "all", epochs=2)
    found = wording.evolve(model, net, data[0], "all", ["each nucleus"], texts[:3])
    best = found["chosen"][0]
    assert found["scores"][best] == found["scores"].max() and found["dice"].shape == (len(wording.SOURCES), 1)
    assert found["dice"][1, 0] == found["fits"][best] <= found["dice"][3, 0]


# ---- the study and the paper ----


def test_the_study_runs_at_smoke_and_repeats_nothing(tmp_path):
    said = []
    cells = {name: study.CELLS[name] for name in ("score, level sets only", "heat-map", "evolve")}
    tables = [study.measure(cell, 0, "smoke", tmp_path) for cell in cells.values()]
    kept = sorted(path.name for path in tmp_path.iterdir())
    again = study.measure(cells["evolve"], 0, "smoke", tmp_path)
    assert again.equals(tables[-1]) and kept == sorted(path.name for path in tmp_path.iterdir())
    scores, heat, evolved = tables
    assert set(scores["source"]) == {"click inside", "click outside", "click in the middle"}
    assert (heat["lowest"] <= heat["median"]).all() and (heat["median"] <= heat["highest"]).all()
    assert (evolved["score"] >= evolved["score_first"]).all() and len(evolved) == 3
    assert (evolved["dice"] <= evolved["dice_oracle"]).all()
    assert all({"name", "split", "digest"} == {*one} for one in evolved.attrs["datasets"])
    assert studies.find("evolve") is study.STUDY and not said


def test_an_interval_needs_every_film_of_every_seed():
    table = pd.DataFrame({"seed": [0, 0, 1, 1], "image": ["a", "b"] * 2, "value": [1.0, 2.0, 1.0, 2.0]})
    mean, low, high = study.mean_with_interval(table, "value")
    assert (mean, low, high) == (1.5, 1.0, 2.0)
    lacking = table.iloc[:3]
    with pytest.raises(ResultError, match="lack some images"):
        study.mean_with_interval(lacking, "value")


def test_the_paper_s_figures_are_as_printed():
    frame = paper.evolved_prompt()
    printed = frame.set_index("figure")["value"]
    assert "2310.17128" in frame.attrs["source"] and len(frame) == 10
    assert printed["films with a higher Dice after evolving"] == 38 and printed["films in the test"] == 53
    correlations = printed[printed.index.str.startswith("correlation")].tolist()
    assert correlations == [0.88, 0.90, 0.67]
