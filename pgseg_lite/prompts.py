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
ENTRY = ("text", "heldout")  # what an entry of a list may say
BANKS = Path(__file__).parent / "banks"


@dataclass(frozen=True)
class Phrasing:
    text: str
    target: str
    level: str
    split: str
    noun: str  # "" for a literal phrasing
    template: str  # the text itself for a literal phrasing


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
    digest: str

    @classmethod
    def load(cls, name_or_path="nuclei"):
        """The bank bundled under this name, or the YAML file at this path."""
        path = BANKS / f"{name_or_path}.yaml"
        path = path if path.is_file() else Path(name_or_path)
        content = _mapping(_read_yaml(path), path, "the file", ("name", "split", "levels", "targets"))
        levels = _mapping(content.get("levels", {}), path, "levels", LEVELS)
        entries = _mapping(content.get("targets", {}), path, "targets")
        if not entries:
            raise BankError(f"{path}: there are no targets; add at least one under 'targets'")
        targets = tuple(sorted(entries, key=lambda target: target != "all"))  # a stable sort
        phrasings = tuple(p for target in targets for p in _expand(path, target, entries[target], levels))
        digest = hashlib.sha256(json.dumps([astuple(p) for p in phrasings]).encode()).hexdigest()[:12]
        name, split_name = str(content.get("name", path.stem)), str(content.get("split", "unnamed"))
        return cls(name, split_name, targets, phrasings, digest)

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


def _read_yaml(path):
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


def _mapping(value, path, field, known=None):
    if not isinstance(value, dict):
        found = "empty" if value is None else f"a {type(value).__name__}"
        raise BankError(f"{path}: {field} is {found}; make it a mapping (name: value)")
    for key in value:
        if not isinstance(key, str) or (known and key not in known):
            wanted = f"use one of {', '.join(known)}" if known else "put the name in quotes"
            raise BankError(f"{path}: {field} has an unknown key {key!r}; {wanted}")
    return value


def _entries(value, path, field):
    """[(text, heldout)] from a list whose entries are strings or {text: ..., heldout: true}."""
    if not isinstance(value, list) or not value:
        raise BankError(f"{path}: {field} must be a list with at least one entry; fill it or remove it")
    entries = []
    for i, entry in enumerate(value):
        entry = _mapping(entry if isinstance(entry, dict) else {"text": entry}, path, f"{field}[{i}]", ENTRY)
        text, heldout = entry.get("text"), entry.get("heldout", False)
        if not isinstance(text, str) or not text.strip():
            raise BankError(f"{path}: {field}[{i}] must be text, found {text!r}; write words, in quotes")
        if not isinstance(heldout, bool):
            raise BankError(f"{path}: {field}[{i}].heldout is {heldout!r}; write true or false")
        entries.append((text, heldout))
    return entries


def _expand(path, target, entry, levels):
    """All phrasings of one target: its fixed one, then per level the listed and the grammar's."""
    here = f"{path}: targets.{target}"
    _mapping(entry, path, f"targets.{target}", ("fixed", "nouns", "exclusions", "phrasings"))
    fixed, listed = entry.get("fixed"), entry.get("phrasings", {})
    if not isinstance(fixed, str) or not fixed.strip():
        raise BankError(f"{here}.fixed is missing; give the target's one canonical phrasing as text")
    _mapping(listed, path, f"targets.{target}.phrasings", LEVELS)
    found = []
    for level in LEVELS:
        if level in listed:
            for text, heldout in _entries(listed[level], path, f"targets.{target}.phrasings.{level}"):
                found.append(Phrasing(text, target, level, SPLITS[heldout], "", text))
        if level in levels and "nouns" in entry:
            found += _fill_templates(path, target, entry, level, levels[level])
    if not found:
        raise BankError(f"{here} has no phrasings; add 'phrasings', or 'nouns' and 'levels'")
    same = [p for p in found if p.text == fixed] or [Phrasing(fixed, target, "low", "train", "", fixed)]
    if any((p.level, p.split) != ("low", "train") for p in same):
        raise BankError(f"{here}.fixed {fixed!r} stands elsewhere; make it low and not held out")
    return same + [p for p in found if p.text != fixed]


def _fill_templates(path, target, entry, level, grammar):
    """Each noun meets each template once, with the next verb, place and exclusion of their lists.

    The full product would be thousands of look-alikes; rotating at different paces uses the words of
    every list within nouns x templates phrasings.
    """
    _mapping(grammar, path, f"levels.{level}", ("templates", "verbs", "places"))
    lists = {**grammar, **entry}
    words = {}  # noun, verb, place, exclusion -> (how fast it turns, [(text, heldout)])
    for pace, name in enumerate(("noun", "verb", "place", "exclusion")):
        if f"{name}s" in lists:
            words[name] = pace, _entries(lists[f"{name}s"], path, f"{name}s of {level} {target}")
    slot = re.compile("{(" + "|".join(words) + ")}")
    found = []
    for j, (template, rare) in enumerate(_entries(grammar.get("templates"), path, f"levels.{level}.templates")):
        here = f"{path}: levels.{level}.templates[{j}] {template!r}"
        if re.search("[{}]", slot.sub("", template)):
            known = ", ".join(f"{{{name}}}" for name in words)
            raise BankError(f"{here} may use only {known} for '{target}'; correct it or add its list")
        if "{noun}" not in template:
            raise BankError(f"{here} lacks {{noun}}, so it names no target; add {{noun}}")
        for i, (noun, _) in enumerate(words["noun"][1]):
            picked = {name: options[(i + pace * j) % len(options)] for name, (pace, options) in words.items()}
            text = slot.sub(lambda match, picked=picked: picked[match[1]][0], template)
            heldout = rare or any(picked[name][1] for name in slot.findall(template))
            found.append(Phrasing(text, target, level, SPLITS[heldout], noun, template))
    return found
