"""The bundled bank keeps its promises, and a bad bank gets one clear sentence."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from pgseg_lite.errors import BankError
from pgseg_lite.prompts import BANKS, LEVELS, SPLITS, Foil, PromptBank

TARGETS = ("all", "neoplastic", "inflammatory", "connective", "dead", "epithelial", "spindle", "other")
GRAMMAR = """
name: glands
split: demo-v1
levels:
  low: {verbs: [segment, {text: trace, heldout: true}], templates: ["{verb} {noun}", "{noun}"]}
targets:
  vessels: {fixed: vessels, phrasings: {low: [vessels, {text: blood vessels, heldout: true}]}}
  all: {fixed: structures, nouns: [structures, {text: objects, heldout: true}]}
"""


@pytest.fixture(scope="module")
def bank():
    return PromptBank.load("nuclei")


@pytest.fixture
def write(tmp_path):
    def write(text, name="bank.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_bundled_bank_has_enough_of_everything(bank):
    assert bank.targets == TARGETS
    assert len(bank.phrasings) <= 2600
    for target in TARGETS:
        assert len({p.text for p in bank.select(target)}) >= 150
        for level in LEVELS:
            assert 60 <= len({p.text for p in bank.select(target, level)}) <= 100
            assert len(bank.select(target, level, "train")) >= 20
            assert len(bank.select(target, level, "heldout")) >= 12


def test_bundled_texts_are_distinct_and_tidy(bank):
    texts = Counter(p.text for p in bank.phrasings)
    assert not [text for text, count in texts.items() if count > 1]
    for text in texts:
        assert text == " ".join(text.split()) and "{" not in text
        assert not {"the the", "all all", "of of", "a all"} & {
            " ".join(two) for two in zip(text.split(), text.split()[1:], strict=False)
        }


def test_digest_changes_only_with_the_name_of_the_split(bank):
    # Committed results name this split. If you change wordings, change the split's name and this line.
    assert (bank.split_name, bank.digest) == ("nouns-and-templates-v1", "e266d468d0c7")


def test_expansion_is_the_same_in_another_process_and_hash_seed(bank):
    code = "from pgseg_lite.prompts import PromptBank as P; b = P.load(); print(b.digest, b.phrasings[-1].text)"
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            cwd=BANKS.parents[1],
            capture_output=True,
        )
        assert run.stdout.decode().strip() == f"{bank.digest} {bank.phrasings[-1].text}", run.stderr


def test_import_is_light():
    code = "import sys, pgseg_lite.prompts; print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=BANKS.parents[1], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


def test_train_and_heldout_share_neither_text_nor_heldout_noun(bank):
    for target in TARGETS:
        train, heldout = (bank.select(target, split=split) for split in SPLITS)
        assert not {p.text for p in train} & {p.text for p in heldout}
        unseen = {p.noun for p in heldout} - {p.noun for p in train}
        assert len(unseen - {""}) == 3
        for noun in unseen - {""}:
            assert not [p.text for p in train if f" {noun} " in f" {p.text} "]


@pytest.mark.parametrize("target", TARGETS)
def test_fixed_phrasing_is_a_low_train_phrasing(bank, target):
    first = bank.select(target)[0]
    assert bank.fixed(target) == first.text
    assert (first.level, first.split) == ("low", "train")


def test_select_filters_and_keeps_the_order(bank):
    every = bank.select()
    assert every == list(bank.phrasings)
    some = bank.select("dead", levels=("high", "low"), split="heldout")
    assert {(p.target, p.level, p.split) for p in some} == {("dead", x, "heldout") for x in ("low", "high")}
    assert some == [p for p in every if p in set(some)]
    assert bank.select("dead", "low") == bank.select("dead", ("low",))


def test_sample_shuffles_and_never_repeats(bank):
    group = bank.group("all", levels=("low", "high"))
    for seed in range(30):
        texts = [p.text for p in group.sample(5, np.random.default_rng(seed))]
        assert len(set(texts)) == 5
        assert texts == [p.text for p in group.sample(5, np.random.default_rng(seed))]
    whole = group.sample(len(group.phrasings), np.random.default_rng(0))
    assert set(whole) == set(group.phrasings) and whole != list(group.phrasings)
    first = Counter(group.sample(1, np.random.default_rng(seed))[0].text for seed in range(200))
    assert len(first) > 50 and {p.split for p in group.phrasings} == {"train"}


def test_sample_counts_a_text_once_even_if_the_list_repeats_it(write):
    bank = PromptBank.load(write("targets: {a: {fixed: x, phrasings: {low: [x, y, y]}}}"))
    assert {p.text for p in bank.group("a").sample(2, np.random.default_rng(0))} == {"x", "y"}
    with pytest.raises(BankError, match="from 1 to 2"):
        bank.group("a").sample(3, np.random.default_rng(0))


def test_a_users_list_and_grammar_load(write):
    bank = PromptBank.load(str(write(GRAMMAR)))
    assert (bank.name, bank.split_name, bank.targets) == ("glands", "demo-v1", ("all", "vessels"))
    assert [(p.text, p.split) for p in bank.phrasings] == [
        ("structures", "train"),
        ("segment structures", "train"),
        ("trace objects", "heldout"),
        ("objects", "heldout"),
        ("vessels", "train"),
        ("blood vessels", "heldout"),
    ]
    assert bank.phrasings[1].noun == "structures" and bank.phrasings[1].template == "{verb} {noun}"


def test_a_heldout_verb_holds_out_its_phrasings(write):
    text = GRAMMAR.replace("segment, {text: trace", "{text: trace").replace("}]", "}, segment]", 1)
    texts = {p.text: p.split for p in PromptBank.load(write(text)).select("all")}
    assert texts["trace structures"] == "heldout" and texts["structures"] == "train"


def test_a_missing_fixed_phrasing_is_added_and_names_default(write):
    bank = PromptBank.load(write("targets: {a: {fixed: x, phrasings: {high: [y]}}}", "mine.yaml"))
    assert [(p.text, p.level) for p in bank.phrasings] == [("x", "low"), ("y", "high")]
    assert (bank.name, bank.split_name) == ("mine", "unnamed")


def test_digest_follows_the_content(write):
    one, two = (PromptBank.load(write(GRAMMAR.replace("vessels", word))) for word in ("vessels", "veins"))
    assert one.digest != two.digest and len(one.digest) == 12


def test_bundled_foils_cover_every_target_and_stand_in_no_group(bank):
    assert min(Counter(foil.target for foil in bank.foils)[target] for target in TARGETS) >= 5
    assert {foil.asks_for for foil in bank.foils} > {None, "all", "neoplastic", "inflammatory", "epithelial"}
    assert len(set(bank.foils)) == len(bank.foils)
    assert not {foil.text for foil in bank.foils} & {p.text for p in bank.phrasings}


FOILS = "foils: [{text: tubes, target: all, asks_for: vessels}, {text: blood vessel, target: vessels}]"


def test_foils_load_and_leave_phrasings_and_digest_alone(write):
    plain, with_foils = PromptBank.load(write(GRAMMAR)), PromptBank.load(write(GRAMMAR + FOILS))
    assert with_foils.foils == (Foil("tubes", "all", "vessels"), Foil("blood vessel", "vessels", None))
    assert plain.foils == () and (plain.phrasings, plain.digest) == (with_foils.phrasings, with_foils.digest)


LISTED = "targets: {glands: {fixed: glands, phrasings: {low: [glands]}}}"
BAD_BANKS = {
    "not yaml": ("targets: [", r"bank.yaml, line 1: not a valid bank"),
    "tab": ("targets:\n\tglands: 1", r"line 2: not a valid bank: found character '\\t'"),
    "forbidden character": ("targets: \x07", r"it holds a character that YAML forbids"),
    "python object": (
        "targets: !!python/object/apply:os.getcwd []",
        r"line 1: .*could not determine a constr",
    ),
    "impossible date": (
        "targets: 2026-02-31",
        r"cannot be read as YAML in UTF-8 \(day .*\); give a text file",
    ),
    "not text": (b"\xff\xfe\x00\xd8", r"cannot be read as YAML in UTF-8"),
    "empty file": ("", r"the file is empty; make it a mapping"),
    "a list": ("- glands", r"the file is a list; make it a mapping"),
    "no targets": ("name: x", r"there are no targets; add at least one"),
    "targets a list": ("targets: [glands]", r"targets is a list; make it a"),
    "unknown key": ("target: {}", r"the file has an unknown key 'target'; use one of name, split"),
    "target not text": ("targets: {1: {fixed: x}}", r"targets has an unknown key 1; put the name in quotes"),
    "duplicate target": (
        "targets:\n  a: {fixed: x, phrasings: {low: [x]}}\n  a: {fixed: y, phrasings: {low: [y]}}",
        r"line 3: .*'a' stands twice",
    ),
    "target without a body": ("targets: {glands: }", r"targets.glands is empty; make it a mapping"),
    "fixed missing": (LISTED.replace("fixed: glands, ", ""), r"targets.glands.fixed is missing"),
    "fixed held out": (
        LISTED.replace("[glands]", "[{text: glands, heldout: true}]"),
        r"fixed 'glands' stands elsewhere; make it low",
    ),
    "fixed of another level": (LISTED.replace("low:", "high:"), r"fixed 'glands' stands elsewhere"),
    "no phrasings": ("targets: {a: {fixed: x}}", r"targets.a has no phrasings; add 'phrasings', or 'nouns'"),
    "nouns without levels": ("targets: {a: {fixed: x, nouns: [x]}}", r"targets.a has no phrasings"),
    "unknown level": (
        LISTED.replace("low", "lo"),
        r"phrasings has an unknown key 'lo'; use one of low, medium",
    ),
    "empty list": (
        LISTED.replace("[glands]", "[]"),
        r"targets.glands.phrasings.low must be a list with at l",
    ),
    "not a list": (LISTED.replace("[glands]", "glands"), r"targets.glands.phrasings.low must be a list"),
    "number": (LISTED.replace("[glands]", "[glands, 3]"), r"phrasings.low\[1\].text must be text, found 3"),
    "yaml no": (LISTED.replace("[glands]", "[no]"), r"phrasings.low\[0\].text must be text, found False"),
    "blank": (LISTED.replace("[glands]", "['  ']"), r"phrasings.low\[0\].text must be text, found '  '"),
    "misspelt mark": (
        LISTED.replace("[glands]", "[{text: a, held: true}]"),
        r"low\[0\] has an unknown key 'held'",
    ),
    "mark not a truth": (
        LISTED.replace("[glands]", "[{text: a, heldout: 2}]"),
        r"low\[0\].heldout is 2; write",
    ),
    "template without noun": (GRAMMAR.replace('"{noun}"', '"it"'), r"templates\[1\] 'it' lacks {noun}"),
    "unknown placeholder": (
        GRAMMAR.replace('"{noun}"', '"{nuon}"'),
        r"'{nuon}' may use only {noun}, {verb} for",
    ),
    "open brace": (GRAMMAR.replace('"{noun}"', '"{noun} {"'), r"'{noun} {' may use only"),
    "format trick": (GRAMMAR.replace('"{noun}"', '"{noun:>99999}"'), r"may use only {noun}"),
    "no exclusions": (
        GRAMMAR.replace('"{noun}"', '"{noun}, {exclusion}"'),
        r"for 'all'; correct it or add its l",
    ),
    "no templates": (
        GRAMMAR.replace(', templates: ["{verb} {noun}", "{noun}"]', ""),
        r"targets.all has no phrasings; add",
    ),
    "foils no list": (LISTED + "\nfoils: {text: x}", r"foils must be a list with at least one entry"),
    "foil without target": (LISTED + "\nfoils: [gland]", r"foils\[0\].target must be text, found None"),
    "foil of another bank": (
        GRAMMAR + FOILS.replace("target: all", "target: ducts"),
        r"foils\[0\] 'tubes' is for the target 'ducts'; choose from all, vessels",
    ),
    "foil that asks for an unknown target": (
        GRAMMAR + FOILS.replace("asks_for: vessels", "asks_for: [vessels]"),
        r"'tubes' asks for \['vessels'\]; choose from all, vessels, or null",
    ),
    "foil that asks for its own target": (
        GRAMMAR + FOILS.replace("asks_for: vessels", "asks_for: all"),
        r"'tubes' asks for its own target 'all'; name another",
    ),
    "foil that is a phrasing of its target": (
        GRAMMAR + FOILS.replace("text: tubes", "text: objects"),
        r"foils\[0\] 'objects' is a phrasing of 'all' too; remove one",
    ),
    "foil that is a phrasing of a third target": (
        GRAMMAR + FOILS.replace("text: tubes", "text: vessels").replace("asks_for: vessels", "asks_for: null"),
        r"foils\[0\] 'vessels' is a phrasing of 'vessels' too; remove one",
    ),
    "unknown key of a foil": (
        GRAMMAR + FOILS.replace("asks_for", "asks"),
        r"foils\[0\] has an unknown key 'asks'; use one of text, target, asks_for",
    ),
    "unknown part of a level": (GRAMMAR.replace("verbs:", "verb:"), r"levels.low has an unknown key 'verb'"),
}


@pytest.mark.parametrize("case", BAD_BANKS)
def test_bad_bank(write, case):
    text, message = BAD_BANKS[case]
    path = write(text)
    with pytest.raises(BankError, match=message) as error:
        PromptBank.load(path)
    assert str(error.value).startswith(str(path)) and "; " in str(error.value)  # where, and what to do


def test_missing_bank_names_the_bundled_ones(tmp_path):
    with pytest.raises(BankError, match=r"nowhere.yaml: no such file; .*\(nuclei\)"):
        PromptBank.load(tmp_path / "nowhere.yaml")
    with pytest.raises(BankError, match="cannot be read as YAML"):
        PromptBank.load(tmp_path)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda bank: bank.select("glands"),
            r"bank 'nuclei' has no target 'glands'; choose from all, neoplastic",
        ),
        (lambda bank: bank.fixed("glands"), r"has no target 'glands'"),
        (
            lambda bank: bank.select("all", levels=("lo",)),
            r"has no level 'lo'; choose from low, medium, high",
        ),
        (lambda bank: bank.select("all", split="test"), r"has no split 'test'; choose from train, heldout"),
        (lambda bank: bank.group("all", levels=()), r"has no train phrasing of 'all' at \(\); add one"),
        (
            lambda bank: bank.group("all").sample(0, np.random.default_rng(0)),
            r"k=0 .*give a k from 1 to 1\d\d",
        ),
        (lambda bank: bank.group("all").sample(-1, np.random.default_rng(0)), r"k=-1 phrasings of 'all'"),
        (
            lambda bank: bank.group("all").sample(10**6, np.random.default_rng(0)),
            r"k=1000000 .*the size of this",
        ),
        (lambda bank: bank.group("all").sample(2.0, np.random.default_rng(0)), r"k=2.0"),
    ],
)
def test_bad_request(bank, ask, message):
    with pytest.raises(BankError, match=message):
        ask(bank)
