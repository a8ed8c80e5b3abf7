"""A prompt bank: the many ways in which people ask for one and the same target.

A bank is a YAML file. Per target it holds a grammar (nouns that fill each level's templates), a
literal list of phrasings, or both. The header of banks/nuclei.yaml explains the format.
"""

import hashlib
import json
import re
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import yaml

from .errors import BankError

LEVELS = ("low", "medium", "high")
SPLITS = ("train", "heldout")
BANKS = Path(__file__).parent / "banks"

_ENTRIES = [{"text": str, "heldout": bool}]  # or just the text
_LEVEL = {"templates": _ENTRIES, "verbs": _ENTRIES, "places": _ENTRIES}
_TARGET = {"fixed": str, "nouns": _ENTRIES, "exclusions": _ENTRIES, "phrasings": dict.fromkeys(LEVELS, _ENTRIES)}
_FOILS = [{"text": str, "target": str, "asks_for": object}]
_FILE = {"name": str, "split": str, "levels": dict.fromkeys(LEVELS, _LEVEL), "targets": {"*": _TARGET}, "foils": _FOILS}


@dataclass(frozen=True)
class Phrasing:
    text: str
    target: str
    level: str
    split: str
    noun: str  # "" for a literal phrasing
    template: str  # the text itself for a literal phrasing


@dataclass(frozen=True)
class Foil:
    """A text that resembles a target's phrasings and asks for something else."""

    text: str
    target: str  # whose phrasing it resembles
    asks_for: str | None  # the target it really asks for; None: the bank has no mask for that


@dataclass(frozen=True)
class PromptGroup:
    """Phrasings of one target; with an image they share one mask."""

    target: str
    phrasings: tuple[Phrasing, ...]

    def sample(self, k, generator):
        """k phrasings with k distinct texts, in an order drawn from a numpy.random.Generator."""
        distinct = list({phrasing.text: phrasing for phrasing in self.phrasings}.values())
        if not isinstance(k, int | np.integer) or not 1 <= k <= len(distinct):
            bounds = f"1 to {len(distinct)}, the size of this group"
            raise BankError(f"cannot sample k={k!r} phrasings of '{self.target}'; give a k from {bounds}")
        return [distinct[i] for i in generator.permutation(len(distinct))[:k]]


@dataclass(frozen=True)
class PromptBank:
    name: str
    split_name: str
    targets: tuple[str, ...]  # "all" first when there is one, then the categories
    phrasings: tuple[Phrasing, ...]  # by target in file order, its fixed phrasing first
    digest: str  # of the phrasings alone
    foils: tuple[Foil, ...] = ()  # in file order

    @classmethod
    def load(cls, name_or_path="nuclei"):
        """The bank bundled under this name, or the YAML file at this path."""
        path = BANKS / f"{name_or_path}.yaml"
        path = path if path.is_file() else Path(name_or_path)
        content = read_yaml(path)
        if isinstance(content, dict) and "review" in content:
            raise BankError(f"{path}: a draft with undecided phrasings; decide them with `pgseg prompts review {path}`")
        try:
            empty = {"name": path.stem, "split": "unnamed", "levels": {}, "targets": {}, "foils": []}
            content = empty | _checked(content, _FILE)
            if not content["targets"]:
                raise BankError("there are no targets; add at least one under 'targets'")
            targets = tuple(sorted(content["targets"], key=lambda target: target != "all"))  # a stable sort
            phrasings = tuple(p for t in targets for p in _expand(t, content["targets"][t], content["levels"]))
            foils = tuple(_foil(i, row, targets, phrasings) for i, row in enumerate(content["foils"]))
        except BankError as error:
            raise BankError(f"{path}: {error}") from None
        digest = hashlib.sha256(json.dumps([astuple(p) for p in phrasings]).encode()).hexdigest()[:12]
        return cls(content["name"], content["split"], targets, phrasings, digest, foils)

    def select(self, target=None, levels=LEVELS, split=None):
        """Phrasings in bank order; None stands for every target or split."""
        levels = (levels,) if isinstance(levels, str) else tuple(levels)
        asked = [("target", target, self.targets), ("split", split, SPLITS)]
        for kind, value, known in asked + [("level", level, LEVELS) for level in levels]:
            if value not in (None, *known):
                raise BankError(f"bank '{self.name}' has no {kind} {value!r}; choose from {', '.join(known)}")
        found = [p for p in self.phrasings if target in (None, p.target) and split in (None, p.split)]
        return [p for p in found if p.level in levels]

    def group(self, target, levels=LEVELS, split="train"):
        found = self.select(target, levels, split)
        if not found:
            raise BankError(f"bank '{self.name}' has no {split} phrasing of '{target}' at {levels}; add one")
        return PromptGroup(target, tuple(found))

    def fixed(self, target):
        """The one canonical phrasing of a target: a train phrasing of level low."""
        return self.select(target)[0].text


class _UniqueKeys(yaml.SafeLoader):
    """safe_load, but a key written twice is an error: YAML itself drops the first in silence."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path):
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        bundled = ", ".join(sorted(file.stem for file in BANKS.glob("*.yaml")))
        raise BankError(f"{path}: no such file; give a YAML file or a bundled bank ({bundled})") from None
    except yaml.YAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        problem = getattr(error, "problem", None) or "it holds a character that YAML forbids"
        raise BankError(f"{path}{line}: not a valid bank: {problem}; mend the YAML") from error
    except (OSError, ValueError) as error:  # a folder, another encoding, an impossible date
        raise BankError(f"{path}: cannot be read as YAML in UTF-8 ({error}); give a text file") from error


def _checked(value, schema, field=""):
    """The value, once it is what the schema says; a list's entries as tuples, in the schema's order."""
    here = field or "the file"
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            raise BankError(f"{here} must be a list with at least one entry; fill it or remove it")
        rows = [entry if isinstance(entry, dict) else {"text": entry} for entry in value]
        blank = {key: False if kind is bool else None for key, kind in schema[0].items()}
        rows = [blank | row for row in rows]
        return [tuple(_checked(row, schema[0], f"{field}[{i}]").values()) for i, row in enumerate(rows)]
    if schema is str and not (isinstance(value, str) and value.strip()):
        raise BankError(f"{here} must be text, found {value!r}; write words, in quotes")
    if schema is bool and not isinstance(value, bool):
        raise BankError(f"{here} is {value!r}; write true or false")
    if not isinstance(schema, dict):
        return value
    if not isinstance(value, dict):
        found = "empty" if value is None else f"a {type(value).__name__}"
        raise BankError(f"{here} is {found}; make it a mapping (name: value)")
    for key in value:
        if not isinstance(key, str) or not {key, "*"} & {*schema}:
            wanted = "put the name in quotes" if "*" in schema else f"use one of {', '.join(schema)}"
            raise BankError(f"{here} has an unknown key {key!r}; {wanted}")
    return {k: _checked(part, schema.get(k, schema.get("*")), f"{field}.{k}".strip(".")) for k, part in value.items()}


def _foil(i, row, targets, phrasings):
    """One foil, once it names targets of this bank and is no phrasing but of the target that it asks for."""
    foil, known = Foil(*row), ", ".join(targets)
    here = f"foils[{i}] {foil.text!r}"
    if foil.target not in targets:
        raise BankError(f"{here} is for the target {foil.target!r}; choose from {known}")
    if foil.asks_for not in (None, *targets):
        raise BankError(f"{here} asks for {foil.asks_for!r}; choose from {known}, or null for none of them")
    if foil.asks_for == foil.target:
        raise BankError(f"{here} asks for its own target '{foil.target}'; name another one, or null")
    for p in phrasings:
        if p.text == foil.text and p.target != foil.asks_for:
            raise BankError(f"{here} is a phrasing of '{p.target}' too; remove one of the two")
    return foil


def _expand(target, entry, levels):
    """All phrasings of one target: its fixed one, then per level the listed and the grammar's."""
    if "fixed" not in entry:
        raise BankError(f"targets.{target}.fixed is missing; give the target's one canonical phrasing as text")
    fixed, found = entry["fixed"], []
    for level in LEVELS:
        for text, heldout in entry.get("phrasings", {}).get(level, ()):
            found.append(Phrasing(text, target, level, SPLITS[heldout], "", text))
        if level in levels and "nouns" in entry:
            found += _fill_templates(target, level, {"templates": [], **levels[level], **entry})
    if not found:
        raise BankError(f"targets.{target} has no phrasings; add 'phrasings', or 'nouns' and 'levels'")
    same = [p for p in found if p.text == fixed] or [Phrasing(fixed, target, "low", "train", "", fixed)]
    if any((p.level, p.split) != ("low", "train") for p in same):
        raise BankError(f"targets.{target}.fixed {fixed!r} stands elsewhere; make it low and not held out")
    return same + [p for p in found if p.text != fixed]


def _fill_templates(target, level, lists):
    """Each noun meets each template once, with the next verb, place and exclusion of their lists.

    The full product would be thousands of look-alikes; rotating at different paces uses the words of
    every list within nouns x templates phrasings.
    """
    paces = {"noun": 0, "verb": 1, "place": 2, "exclusion": 3}
    words = {name: lists[f"{name}s"] for name in paces if f"{name}s" in lists}  # name -> [(text, heldout)]
    slot, found = re.compile("{(" + "|".join(words) + ")}"), []
    for j, (template, template_heldout) in enumerate(lists["templates"]):
        here = f"levels.{level}.templates[{j}] {template!r}"
        if re.search("[{}]", slot.sub("", template)):
            known = ", ".join(f"{{{name}}}" for name in words)
            raise BankError(f"{here} may use only {known} for '{target}'; correct it or add its list")
        if "{noun}" not in template:
            raise BankError(f"{here} lacks {{noun}}, so it names no target; add {{noun}}")
        for i, (noun, _) in enumerate(words["noun"]):
            picked = {name: options[(i + paces[name] * j) % len(options)] for name, options in words.items()}
            text = slot.sub(lambda match, picked=picked: picked[match[1]][0], template)
            heldout = template_heldout or any(picked[name][1] for name in slot.findall(template))
            found.append(Phrasing(text, target, level, SPLITS[heldout], noun, template))
    return found
