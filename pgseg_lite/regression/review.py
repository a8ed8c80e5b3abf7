"""Decide what is undecided in a draft bank: in the terminal, or in a notebook. Every decision is saved at once."""

import html
from pathlib import Path

from ..errors import BankError
from ..prompts import LEVELS, read_yaml
from .collect import as_content, write_draft

HELP = "Enter accepts, t TARGET and l LEVEL change, d drops, u takes the last decision back, q quits (to go on later)"


class Review:
    """A draft and its next undecided phrasing."""

    def __init__(self, path):
        self.path, content = Path(path), read_yaml(Path(path))
        review = content.get("review") if isinstance(content, dict) else None
        if not isinstance(review, dict):
            raise BankError(f"{path}: nothing in it is undecided; give a draft that `pgseg prompts import` wrote")
        self.name, self.canonical = content.get("name", self.path.stem), review.get("canonical")
        if not isinstance(self.canonical, dict) or not self.canonical:
            raise BankError(f"{path}: review.canonical is missing, so its targets are not known; import it again")
        self.targets = tuple(self.canonical)
        self.undecided, self.decided = (self._items(review, part) for part in ("undecided", "decided"))
        if not self.undecided:  # by hand, so the file is no bank yet
            self._save(self.undecided, self.decided)

    def _items(self, review, part):
        items = review.get(part)
        if not isinstance(items, list):
            raise BankError(f"{self.path}: review.{part} is no list; import it again")
        for i, item in enumerate(items):
            good = isinstance(item, dict) and isinstance(item.get("text"), str) and item["text"].strip()
            if not good or item.get("target") not in self.targets or item.get("level") not in LEVELS:
                raise BankError(f"{self.path}: review.{part}[{i}] needs a text, a known target and a level; mend it")
        return items

    @property
    def current(self):
        return self.undecided[0] if self.undecided else None

    @property
    def progress(self):
        return f"{len(self.undecided)} undecided, {len(self.decided)} decided"

    @property
    def outcome(self):
        if all(item.get("dropped") for item in self.decided):
            return f"Everything is decided, and nothing is left: {self.path} is no bank."
        return f"Everything is decided: {self.path} is a bank; check it with pgseg prompts lint {self.path}"

    def accept(self):
        self._move(self.undecided, self.decided, 0, {"reviewed": True})

    def drop(self):
        self._move(self.undecided, self.decided, 0, {"reviewed": True, "dropped": True})

    def undo(self):
        """The last reviewed item is undecided again, as it was changed."""
        reviewed = [i for i, item in enumerate(self.decided) if item.get("reviewed")]
        if not reviewed:
            raise BankError("there is no decision to take back")
        self._move(self.decided, self.undecided, reviewed[-1], {"reviewed": None, "dropped": None})

    def change(self, **values):
        """Another target or level for the current item, by name or by how a name begins."""
        known = {"target": self.targets, "level": LEVELS}
        for kind, value in values.items():
            fits = [name for name in known[kind] if name == value] or [
                name for name in known[kind] if value and name.startswith(value)
            ]
            if len(fits) != 1:
                raise BankError(f"there is no one {kind} {value!r}; choose from {', '.join(known[kind])}")
            item = {key: said for key, said in self.current.items() if key != f"{kind}_confidence"}
            self._save([item | {kind: fits[0]}, *self.undecided[1:]], self.decided)

    def _move(self, source, to, at, marks):
        item = {key: value for key, value in (source[at] | marks).items() if value is not None}
        rest = source[:at] + source[at + 1 :]
        first = [item, *to] if to is self.undecided else [*to, item]
        self._save(*((first, rest) if to is self.undecided else (rest, first)))

    def _save(self, undecided, decided):
        """The file first: what cannot be written is not decided."""
        write_draft(self.path, as_content(self.name, self.canonical, undecided, decided))
        self.undecided, self.decided = undecided, decided


def describe(item):
    """The lines that a person decides by."""
    said = [f"{item['text']!r}, count {item.get('count', 1)}"]
    for kind in ("target", "level"):
        sure = f" ({item[f'{kind}_confidence']:.2f})" if f"{kind}_confidence" in item else ""
        said.append(f"  {kind} {item[kind]}{sure}")
    return said + [f"  because: {why}" for why in item.get("why", [])]


def walk(review, ask=input, say=print):
    """The review in the terminal, until everything is decided, the input ends or somebody quits."""
    say(f"{review.progress}. {HELP}\ntargets: {', '.join(review.targets)}; levels: {', '.join(LEVELS)}")
    while True:
        known = {"u": review.undo}
        if review.current:
            known |= {"": review.accept, "a": review.accept, "d": review.drop}
            say("\n".join(describe(review.current)))
        else:
            say(f"{review.outcome} Enter ends the review, u takes the last decision back.")
        try:
            answer, _, value = ask(f"[{len(review.undecided)}] ").strip().partition(" ")
        except EOFError:
            answer = "q"
        if answer == "q" or not (answer or review.current):
            break
        try:
            if answer in known:
                known[answer]()
            elif answer in ("t", "l") and review.current:
                review.change(**{{"t": "target", "l": "level"}[answer]: value.strip()})
            else:
                say(HELP)
        except BankError as error:
            say(f"  {error}")
    if review.current:
        say(f"\n{review.progress}; go on with: pgseg prompts review {review.path}")


def review_widget(path):
    """The same in a notebook. Needs a running kernel; a static page shows the sentence above it."""
    import ipywidgets
    from IPython.display import HTML, display

    review = Review(path)
    display(HTML(f"<p>Decisions are saved in {html.escape(str(path))} at once. The buttons need a running kernel; "
                 f"without one, use <code>pgseg prompts review {html.escape(str(path))}</code>.</p>"))  # fmt: skip
    shown = ipywidgets.HTML()
    target = ipywidgets.Dropdown(options=review.targets, description="target")
    level = ipywidgets.Dropdown(options=LEVELS, description="level")
    buttons = {name: ipywidgets.Button(description=name) for name in ("accept", "drop", "undo")}

    def show(message=""):
        item = review.current
        lines = describe(item) if item else [review.outcome]
        lines = [review.progress, *lines, message]
        shown.value = f'<div aria-live="polite">{"<br>".join(html.escape(line) for line in lines if line)}</div>'
        for control in (target, level, buttons["accept"], buttons["drop"]):
            control.disabled = item is None
        if item:
            target.value, level.value = item["target"], item["level"]

    def decide(button):
        message = ""
        try:
            if button.description == "accept":
                chosen = {"target": target.value, "level": level.value}
                changed = {kind: value for kind, value in chosen.items() if value != review.current[kind]}
                review.change(**changed)
            getattr(review, button.description)()
        except BankError as error:
            message = str(error)
        show(message)

    for button in buttons.values():
        button.on_click(decide)
    show()
    return ipywidgets.VBox([shown, ipywidgets.HBox([target, level]), ipywidgets.HBox(list(buttons.values()))])
