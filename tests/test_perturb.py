"""Perturbed phrasings and how masks hold against them: properties of each kind, then the curves of real checkpoints."""

import io
from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

import pgseg_lite as pg
from pgseg_lite.cli import main
from pgseg_lite.errors import SettingsError
from pgseg_lite.lint import normalise
from pgseg_lite.models.base import SegmentationOutput
from pgseg_lite.plots import png
from pgseg_lite.regression.perturb import KINDS, SEVERITIES, Context, claimed, perturb, singular, word_lists
from pgseg_lite.regression.severity import MEASURES, severity_curves, severity_records, show_severity, spread

LANGUAGES = ("latin", "german", "french", "spanish")
STAY = [name for name, kind in KINDS.items() if not kind.must_move]


@pytest.fixture(scope="module")
def bank():
    return pg.PromptBank.load()


@pytest.fixture(scope="module")
def table(bank):
    """Every kind on four phrasings of each target and level, the identity included."""
    chosen = [p for t in bank.targets for level in ("low", "medium", "high") for p in bank.select(t, level)[::32]]
    return perturb(bank, KINDS, (0, *SEVERITIES), phrasings=chosen)


@pytest.fixture
def glands(tmp_path):
    """Somebody's own bank, about which the word lists know next to nothing."""
    path = tmp_path / "crypts.yaml"
    path.write_text(
        "targets:\n"
        "  crypts: {fixed: crypts, phrasings: {low: [crypts, draw crypts], medium: ['draw crypts, even pale, as one mask']}}\n"
        "  goblets: {fixed: goblets, phrasings: {low: [goblets, draw goblets]}}\n"
    )
    return pg.PromptBank.load(path)


def part(table, kind):
    return table[table["kind"] == kind]


# ---- what holds for every kind ----


@pytest.mark.parametrize("kind", KINDS)
def test_severity_zero_is_the_text_itself(table, kind):
    rows = part(table, kind).query("severity == 0")
    assert len(rows) and (rows["text"] == rows["source"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_severity_changes_a_text_that_it_stands_for(table, kind):
    """A kind that can change nothing in a phrasing has no rows for it, so its last severity is never the source."""
    last = part(table, kind).query("severity == 5")
    assert len(last) and (last["text"] != last["source"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_empty_or_has_stray_spaces(table, kind):
    texts = part(table, kind)["text"]
    assert texts.map(normalise).str.len().min() > 0
    assert (texts == texts.map(lambda text: " ".join(text.split()))).all()


@pytest.mark.parametrize("kind", STAY)
def test_what_should_mean_the_same_never_reads_like_another_target_or_a_foil(bank, table, kind):
    others = {t: {normalise(p.text) for p in bank.phrasings if p.target != t} for t in bank.targets}
    foils = {normalise(f.text): f.asks_for for f in bank.foils}
    for row in part(table, kind).itertuples():
        text = normalise(row.text)
        assert text not in others[row.target] or text == normalise(row.source)
        assert foils.get(text, row.target) == row.target


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_of_meaning_is_the_kind_s_own(table, kind):
    assert set(part(table, kind)["must_move"]) == {kind in ("negation", "foil")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_texts_whatever_else_is_asked(bank, table, kind):
    some = part(table, kind)["source"].unique()[:6]
    alone = perturb(bank, [kind], (3,), phrasings=[p for p in bank.phrasings if p.text in some])
    asked = part(table, kind).query("severity == 3 and source in @some").merge(alone, on=["target", "source"])
    assert len(asked) and (asked["text_x"] == asked["text_y"]).all()


@pytest.mark.parametrize("kind", ["typos", "order", "verbosity", "synonyms", "shorthand", "punctuation"])
def test_another_seed_gives_other_texts(bank, kind):
    chosen = bank.select("all", "high", "heldout")[:8]
    first, second = (perturb(bank, [kind], (2,), seed, chosen)["text"].tolist() for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("kind", ["typos", "number", "synonyms", "order", "verbosity", "truncation", "shorthand"])
def test_more_severe_is_further_from_the_source(table, kind):
    """Each severity keeps what a lower one changed, so that similarity falls on the whole; case and marks step instead."""
    likeness = [
        np.mean([SequenceMatcher(None, r.source, r.text, False).ratio() for r in rows.itertuples()])
        for _, rows in part(table, kind).groupby("severity")
    ]
    assert likeness[0] == 1 and all(a >= b - 1e-9 for a, b in pairwise(likeness))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["a", "?", "核", "é è", "x  y ", " two\nlines, of it.", "A&B (1) [2] \\1 {x}", "s s s s", "the"]
)
def test_odd_texts_come_back_as_they_are_at_severity_zero_and_never_empty(kind, text):
    for context in (Context(), Context(target="all", name=text.split()[0], other="red cells")):
        assert KINDS[kind].function(text, 0, context) == text
        for severity in SEVERITIES:
            assert KINDS[kind].function(text, severity, context).strip()


# ---- what each kind does ----


@pytest.mark.parametrize(
    ("kind", "severity", "text", "expected"),
    [
        ("case", 1, "find all nuclei", "Find all nuclei"),
        ("case", 2, "find all nuclei", "Find All Nuclei"),
        ("case", 3, "find all nuclei", "FIND all NUCLEI"),
        ("case", 4, "find all nuclei", "FIND ALL NUCLEI"),
        ("punctuation", 1, "find all nuclei", "find all nuclei."),
        ("punctuation", 1, "find all nuclei.", "find all nuclei !"),
        ("number", 5, "nuclei of tumour cells", "nucleus of tumour cell"),
        ("number", 5, "every nucleus across this class", "every nuclei across this class"),
        ("number", 5, "glands", "gland"),
        ("synonyms", 5, "segment cancerous cells", None),
        ("synonyms", 5, "non-viable cell nuclei", "dead cell nuclear profiles"),
        ("synonyms", 5, "draw crypts", "draw crypts"),
        ("shorthand", 5, "please segment the white blood cell nuclei", "pls seg WBC nuc"),
        ("order", 5, "tumour nuclei", "nuclei tumour"),
        ("order", 1, "nuclei, but", "nuclei, but"),
        ("truncation", 5, "tumour nuclei in the whole of this large image", "tumour nuclei in the wh"),
        ("german", 5, "outline the nuclei", "bitte alle Zellkerne segmentieren"),
        ("latin", 5, "outline the nuclei", "designa omnes nuclei cellularum"),
        ("negation", 1, "outline all the nuclei here", "outline all the non-nuclei here"),
        ("negation", 2, "outline all the nuclei here", "outline everything but nuclei here"),
        ("negation", 4, "outline all the nuclei here", "do not mark the nuclei, mark the rest"),
        ("foil", 2, "outline the nuclei here", "outline red cells instead of nuclei here"),
        ("foil", 4, "outline the nuclei here", "outline the red cells here"),
        ("foil", 5, "outline the nuclei here", "red cells"),
    ],
)
def test_kind_by_example(kind, severity, text, expected):
    context = Context(target="all", name="nuclei" if "nuclei" in text else "", other="red cells")
    changed = KINDS[kind].function(text, severity, context)
    assert changed == expected if expected else changed != text
    assert KINDS[kind].function(text, 0, Context(name=context.name, other=context.other)) == text


@pytest.mark.parametrize("severity", SEVERITIES)
def test_typos_change_that_many_places(severity):
    text = "carefully delineate the individual neoplastic nuclei throughout the tissue section"
    for seed in range(20):
        changed = KINDS["typos"].function(text, severity, Context(np.random.default_rng(seed)))
        blocks = SequenceMatcher(None, text, changed, False).get_opcodes()
        assert 1 <= sum(tag != "equal" for tag, *_ in blocks) <= 2 * severity  # an exchange counts as two
        assert changed != text and len(changed.split()) == len(text.split())


def test_truncation_leaves_the_name_recognisable(table):
    rows = part(table, "truncation").query("severity == 5 and target == 'neoplastic'")
    assert rows["text"].str.contains("neopl|tum|canc|malig|carcin", regex=True).all()


def test_order_never_carries_a_word_into_an_exclusion():
    text = "outline tumour nuclei but not the normal cells"
    for seed in range(20):
        changed = KINDS["order"].function(text, 5, Context(np.random.default_rng(seed)))
        assert set(changed.split(" but ")[0].split()) == {"outline", "tumour", "nuclei"}


@pytest.mark.parametrize(
    ("plural", "one"),
    [("cells", "cell"), ("bodies", "body"), ("patches", "patch"), ("masses", "mass"), ("tissue", None), ("class", None), ("us", None), ("across", None)],
)  # fmt: skip
def test_singular_by_rule(plural, one):
    assert singular(plural) == one


def test_word_lists_are_sound(bank):
    words = word_lists()
    for listed in (words["synonyms"], words["shorthand"], *(said["words"] for said in words["languages"].values())):
        assert all(isinstance(k, str) and v and all(isinstance(x, str) for x in v) for k, v in listed.items())
    for said in words["languages"].values():
        assert set(said["names"]) == set(bank.targets) and "{name}" in said["request"]
    negations = {"not", "no", "without", "but", "except"}
    assert not [f for listed in words["fillers"].values() for f in listed if negations & set(f.split())]


# ---- which kinds, which banks ----


def test_other_languages_are_offered_only_where_the_encoder_claims_them(bank):
    assert not set(LANGUAGES) & set(claimed()) and set(claimed()) | set(LANGUAGES) == set(KINDS)
    assert "german" in claimed(("en", "de")) and "latin" not in claimed(("en", "de"))
    assert not set(LANGUAGES) & set(perturb(bank, phrasings=bank.select("dead")[:3])["kind"])


def test_a_bank_of_one_s_own_gets_the_generic_kinds(glands):
    table = perturb(glands, KINDS)
    of_crypts = table[table["target"] == "crypts"]
    assert {"typos", "case", "punctuation", "order", "verbosity", "truncation", "number", "negation", "foil"} <= set(
        of_crypts["kind"]
    )
    foils = of_crypts.query("kind == 'foil'")
    assert set(foils["asks_for"]) == {"goblets"} and "draw goblets" in set(foils["text"])
    assert "draw non-crypts" in set(of_crypts["text"])


def test_a_bank_of_one_target_has_no_foils(tmp_path):
    (tmp_path / "one.yaml").write_text("targets: {crypts: {fixed: crypts, phrasings: {low: [crypts, draw crypts]}}}")
    assert "foil" not in set(perturb(pg.PromptBank.load(tmp_path / "one.yaml"))["kind"])


def test_a_perturbed_text_that_another_target_owns_is_left_out(tmp_path):
    (tmp_path / "two.yaml").write_text(
        "targets: {cells: {fixed: cells, phrasings: {low: [cells, draw cells]}}, cell: {fixed: cell, phrasings: {low: [cell]}}}"
    )
    table = perturb(pg.PromptBank.load(tmp_path / "two.yaml"), ["number"])
    assert set(table["source"]) == {"draw cells"}  # 'cells' would become 'cell'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["spelling"]}, "there is no perturbation 'spelling'; choose from typos, case"),
        ({"severities": (6,)}, "severity 6 is unknown; give whole numbers from 0"),
        ({"severities": ("2",)}, "severity '2' is unknown"),
        ({"kinds": []}, "there is nothing to perturb"),
        ({"severities": ()}, "there is nothing to perturb"),
    ],
)
def test_bad_requests(bank, options, message):
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        perturb(bank, **options)


# ---- what masks do ----


class Deaf:
    """Marks the same half of every image, whatever it is asked; has nothing but `predict`."""

    name = "deaf"

    def predict(self, image, prompts):
        logits = torch.full((1, len(prompts), *image.shape[:2]), -5.0)
        logits[:, :, : image.shape[0] // 2] = 5.0
        return SegmentationOutput(logits, torch.zeros(1, len(prompts)))


@pytest.fixture(scope="module")
def tissue():
    return pg.load_dataset("synthetic", split="test", size=3)


@pytest.fixture(scope="module")
def records(bank, tissue):
    kinds = ("typos", "case", "synonyms", "german", "negation", "foil")
    found = []
    for checkpoint in ("fixed", "group"):
        model = pg.load_segmenter("lite", checkpoint)
        rows = severity_records(model, tissue, bank, kinds, (1, 5), ("low", "high"), quiet=True)
        found.append(rows.assign(segmenter=checkpoint))
    return pd.concat(found, ignore_index=True)


@pytest.fixture(scope="module")
def curves(records):
    return severity_curves(records, resamples=200)


def at(curves, kind, severity, measure="agreement"):
    rows = curves[(curves["kind"] == kind) & (curves["severity"] == severity)].set_index("segmenter")
    return rows[measure].to_dict()


def test_the_mask_of_the_phrasing_itself_is_where_a_curve_begins(curves):
    assert (curves[curves["severity"] == 0]["agreement"] == 1).all()


def test_an_uncased_encoder_does_not_see_case(curves):
    assert at(curves, "case", 5) == {"fixed": 1.0, "group": 1.0}


def test_training_on_prompt_groups_keeps_masks_still_under_other_words(curves):
    still = at(curves, "synonyms", 5)
    assert still["group"] > still["fixed"] + 0.2


def test_masks_follow_a_foil_and_fit_what_it_asks_for(curves):
    for checkpoint in ("fixed", "group"):
        assert at(curves, "foil", 5)[checkpoint] < 0.3
        assert at(curves, "foil", 5, "dice")[checkpoint] < 0.4 < at(curves, "foil", 5, "dice_asked")[checkpoint]


def test_agreement_and_dice_are_those_of_the_model_s_own_masks(bank, tissue, records):
    """One row, recomputed the long way."""
    model, sample = pg.load_segmenter("lite", "group"), tissue[0]
    rows = records.query(
        "segmenter == 'group' and image == @sample.id and kind == 'typos' and severity == 5 and target == 'all'"
    )
    row = rows.iloc[0]
    first, second = model.predict(sample.image, [row["source"], row["text"]]).masks[0].numpy()
    assert row["agreement"] == pytest.approx((first & second).sum() / (first | second).sum())
    truth = sample.masks["all"]
    assert row["dice"] == pytest.approx(2 * (second & truth).sum() / (second.sum() + truth.sum()))
    assert row["area_pred"] == pytest.approx(second.mean())


def test_intervals_hold_their_means_and_images_are_the_unit(curves):
    found = curves.dropna(subset=["agreement"])
    assert (found["agreement_low"] <= found["agreement"] + 1e-9).all()
    assert (found["agreement"] <= found["agreement_high"] + 1e-9).all()
    assert set(curves["images"]) == {3}


def test_a_language_beyond_the_encoder_is_marked(curves):
    assert curves.groupby("kind")["claimed"].all().to_dict() == {
        "typos": True, "case": True, "synonyms": True, "german": False, "negation": True, "foil": True
    }  # fmt: skip


def test_a_deaf_model_agrees_perfectly_and_moves_for_no_foil(bank, tissue):
    records = severity_records(Deaf(), tissue, bank, ["typos", "foil"], (5,), ("low",), quiet=True)
    assert (records["agreement"] == 1).all() and set(records["segmenter"]) == {"deaf"}
    assert records.query("kind == 'foil' and severity == 5")["dice"].mean() == pytest.approx(
        records.query("kind == 'foil' and severity == 0")["dice"].mean()
    )


def test_agreement_needs_no_truth(bank, tissue):
    class Unlabelled:
        name, targets = "slides", ()

        def __iter__(self):
            for i in range(2):
                sample = tissue[i]
                sample.masks = {}
                yield sample

    records = severity_records(pg.load_segmenter(), Unlabelled(), bank, ["typos"], (1,), ("low",), quiet=True)
    curves = severity_curves(records, resamples=50)
    assert records["dice"].isna().all() and curves["dice"].isna().all()
    assert set(records["target"]) == set(bank.targets) and curves["agreement"].notna().all()


def test_an_image_is_encoded_once_for_all_texts(bank, tissue, monkeypatch):
    model, calls = pg.load_segmenter(), []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda image: calls.append(1) or encode(image))
    severity_records(model, tissue, bank, ["case"], (1,), ("low",), quiet=True)
    assert len(calls) == len(tissue)


def test_no_images_or_no_phrasings_is_an_error(glands, tissue):
    class Nothing:
        name, targets = "none", ("crypts",)

        def __iter__(self):
            return iter(())

    with pytest.raises(SettingsError, match="no samples to perturb"):
        severity_records(pg.load_segmenter(), Nothing(), glands, split="train", quiet=True)
    with pytest.raises(SettingsError, match="has no heldout phrasing of crypts; choose another split"):
        severity_records(pg.load_segmenter(), Nothing(), glands, quiet=True)


def test_picture_tells_kinds_apart(curves):
    figure = show_severity(curves)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles[0] == "typos: should stay" and "german: not claimed" in titles and titles[-1] == "foil: must move"
    grounds = {axis.get_title(): axis.get_facecolor() for axis in figure.axes}
    assert len({grounds[title] for title in ("typos: should stay", "german: not claimed", "foil: must move")}) == 3
    for column in range(4):
        lowest = [axis for axis in figure.axes[column::4] if axis.get_title()][-1]
        assert lowest.xaxis.get_tick_params()["labelbottom"], "where the last row is short, the one above has numbers"
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(labels) == ["fixed", "group"] and len(figure.axes[0].collections) == 2  # direct labels, intervals
    assert png(show_severity(curves, "dice"))[:4] == b"\x89PNG" and set(MEASURES) == {"agreement", "dice"}
    with pytest.raises(SettingsError, match="measure 'iou' is unknown"):
        show_severity(curves, "iou")


def test_labels_do_not_cover_each_other():
    assert np.diff(spread([0.5, 0.5, 0.9])).min() >= 0.11 - 1e-9
    assert spread([1.0, 1.0]) == pytest.approx([0.91, 1.02])


# ---- the command ----


def test_perturb_from_the_shell(capsys, tmp_path):
    asked = ["prompts", "perturb", "--kinds", "typos", "foil", "--severity", "0", "2", "--target", "dead"]
    assert main(asked) == 0
    printed = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert (
        set(printed["kind"]) == {"typos", "foil"}
        and set(printed["severity"]) == {0, 2}
        and set(printed["target"]) == {"dead"}
    )
    assert main([*asked, "--output", str(tmp_path / "p.csv")]) == 0
    assert f"{len(printed)} perturbed phrasings" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "p.csv").equals(printed) and len(list(tmp_path.iterdir())) == 1


def test_the_command_says_what_severities_mean(capsys):
    assert main(["prompts", "perturb", "--describe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(KINDS) and all(len(line) > 40 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--kinds fly", "there is no perturbation 'fly'"),
        ("--severity 9", "severity 9 is unknown"),
        ("--target sky", "no target 'sky'"),
        ("--target dead --output {tmp}/no/p.csv", "no such folder for the table"),
        ("{tmp}/none.yaml", "no such file"),
    ],
)
def test_bad_perturb_commands(capsys, tmp_path, arguments, message):
    assert main(["prompts", "perturb", *arguments.format(tmp=tmp_path).split()]) == 2
    assert message in capsys.readouterr().err
