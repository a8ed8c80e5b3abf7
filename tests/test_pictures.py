"""Figures and interaction: what is drawn, what a reader without eyes or kernel gets."""

import io
import re

import numpy as np
import pytest
from PIL import Image

import pgseg_lite as pg
from pgseg_lite import plots, widgets
from pgseg_lite.errors import SettingsError


@pytest.fixture
def image():
    return np.full((32, 32, 3), 200, np.uint8)


@pytest.fixture
def masks():
    masks = np.zeros((4, 32, 32), bool)
    masks[0, :16] = masks[1, :16] = masks[2, :8] = True
    return masks


def test_disagreement_is_zero_where_all_agree_and_one_where_the_group_is_split(masks):
    split = plots.disagreement(masks)
    assert split[20, 0] == 0
    assert split[12, 0] == 1  # two of four
    assert split[4, 0] == pytest.approx(4 * 0.75 * 0.25)


def test_figures_are_white_pngs_with_one_panel_a_mask(image, masks):
    figure = plots.show_masks(image, masks, list("abcd"), truth=masks[0])
    assert [title for axis in figure.axes if (title := axis.get_title())] == list("abcd")
    assert figure.get_facecolor() == (1, 1, 1, 1)
    again = plots.show_masks(image, masks, list("abcd"), truth=masks[0])
    assert plots.png(figure) == plots.png(again)  # the same bytes, so a rerun leaves no diff


@pytest.mark.parametrize("lines", (1, 2, 3))
@pytest.mark.parametrize("count", (1, 3, 6))
def test_titles_over_one_row_of_panels_are_not_cut_off(image, count, lines):
    figure, axes = plots.panels(count, columns=count)
    for axis in axes:
        plots.outline(axis, image, title="\n".join(["a title"] * lines))
    picture = np.asarray(Image.open(io.BytesIO(plots.png(figure))).convert("L"))
    assert (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all()


def test_a_palette_makes_tissue_small_and_keeps_the_ground_white():
    tissue = pg.load_dataset("synthetic", split="test", size=1)[0]

    def drawn(colours):
        return plots.png(plots.show_masks(tissue.image, tissue.masks["all"][None], ["a tile"]), colours=colours)

    whole, small = drawn(None), drawn(256)
    assert len(small) < 0.6 * len(whole) and small == drawn(256)
    before, after = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int) for data in (whole, small))
    assert (after[0, 0] == 255).all() and np.abs(before - after).mean() < 5


def test_show_carries_the_alt_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **options: shown.append((data, options)))
    plots.show(plots.panels(1)[0], alt="An empty panel, for a test.")
    ((data, options),) = shown
    assert data["image/png"].startswith(b"\x89PNG")
    assert options == {"metadata": {"image/png": {"alt": "An empty panel, for a test."}}, "raw": True}
    with pytest.raises(SettingsError, match="a figure needs an alt text"):
        plots.show(plots.panels(1)[0], alt=" ")


def test_masks_without_titles(image, masks):
    with pytest.raises(SettingsError, match="4 masks and 1 titles; give one title a mask"):
        plots.show_masks(image, masks, ["a"])


def figures(count):
    return [plots.panels(1)[0] for _ in range(count)]


def test_slider_is_plain_html_with_an_alt_text_per_frame():
    html = widgets.slider(figures(3), ["a", "b <i>", "c</script>"], ["first", "second", "third"], "phrasing").data
    assert html.count("data:image/jpeg;base64,") == 4  # three frames, the first also as the picture itself
    assert 'type="range" min="0" max="2"' in html and 'alt="first"' in html
    assert all(f'"alt": "{alt}"' in html for alt in ("first", "second", "third"))
    assert html.count("</script>") == 2, "a label ended the script"
    assert not re.findall(r"https?://", html)


def test_a_slider_opens_where_it_is_told_to():
    html = widgets.slider(figures(3), ["a", "b", "c"], ["first", "second", "third"], "x", start=1).data
    assert 'value="1"' in html and 'alt="second"' in html and "<output>b</output>" in html


@pytest.mark.parametrize(
    ("count", "labels", "message"),
    [
        (1, ["a"], "1 frames; a slider takes 2 to 12"),
        (13, list("abcdefghijklm"), "13 frames; a slider takes 2 to 12"),
        (2, ["a"], "2 figures, 1 labels, 2 alt texts; give each frame one"),
    ],
)
def test_bad_sliders(count, labels, message):
    with pytest.raises(SettingsError, match=message):
        widgets.slider(figures(count), labels, ["alt"] * count, "x")


def test_frames_too_large_for_a_page():
    noisy = []
    for seed in range(2):
        figure, (axis,) = plots.panels(1)
        figure.set_size_inches(20, 20)
        axis.imshow(np.random.default_rng(seed).random((1500, 1500, 3)))
        noisy.append(figure)
    with pytest.raises(SettingsError, match=r"the frames take \d+ kB of 500; make the figures smaller"):
        widgets.slider(noisy, ["a", "b"], ["a", "b"], "x")


def test_ask_answers_each_phrasing_from_one_encoding(image):
    """The live widget, driven as a person would: type, and look at the output."""
    import torch

    from pgseg_lite.models.lite import LiteConfig, LiteSegmenter

    torch.manual_seed(0)
    model = LiteSegmenter(LiteConfig(widths=[8, 16], dim=8, text_hidden=16)).eval()
    calls = []
    encode = model.encode_image
    model.encode_image = lambda image: calls.append(1) or encode(image)
    field, picture = widgets.ask(model, image).children
    shown = [picture.value]
    for text in ("lymphocytes", 'a "quoted" <wish>', " "):  # the last stands for the first phrasing again
        field.value = text
        shown.append(picture.value)
    assert "phrasing: lymphocytes" in shown[1] and "&quot;quoted&quot; &lt;wish&gt;" in shown[2]
    assert shown[3] == shown[0] and field.description == "phrasing"
    assert len(calls) == 1
