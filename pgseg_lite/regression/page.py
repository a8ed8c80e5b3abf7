"""A report as one HTML file: nothing is fetched, it reads on a phone and in the dark, pictures say what they show."""

import base64
from html import escape

import numpy as np

from ..metrics import dice, majority
from .checks import FAIL, PASS
from .summary import HEADINGS, SHOWN, interval

WORST = 4  # groups shown with pictures
LISTED = 50  # failed items listed
STYLE = """
:root { color-scheme: light dark; --line: #8886; --bad: #b3261e; --good: #1b6e3c; --soft: #8882; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; --good: #7ddc9f; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { border-left: .4rem solid var(--good); background: var(--soft); padding: .7rem 1rem; font-weight: 600; }
.verdict.fail { border-color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; vertical-align: top; }
th { white-space: nowrap; } td small { white-space: nowrap; opacity: .75; }
.text, th.text { text-align: left; } td.long { text-align: left; min-width: 18rem; }
.fail b { color: var(--bad); } .pass b { color: var(--good); } ul { padding-left: 1.2rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: white; border-radius: .3rem; }
figcaption { font-size: .85rem; }
"""


def page(report):
    about = escape(report.heading)
    outcome = PASS if report.passed else FAIL
    body = [
        f"<h1>Prompt robustness of {escape(report.result.about['model'])}</h1><p>{about}.</p>",
        f'<p class="verdict {outcome}" role="status">{escape(report.verdict)}</p>',
        checks(report),
        "<h2>The groups that agree least</h2>",
        *pictures(report.result),
        f"<h2>How far masks move with wording</h2><p>{escape(report.measured_against)} In small print: 95 % bootstrap "
        "intervals over images. Spread and range are over the phrasings of one image; agreement is the mean IoU of "
        "two of them; flips is the share of pixels on which they do not agree; false area is what is marked where "
        "the target is absent.</p>",
        figures(report),
        words(report),
        failures(report.result),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Prompt robustness: {outcome}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def table(headings, rows):
    """Cells are (text, small print) or text; the first two columns are words, the last is a sentence."""
    kinds = ["text", "text", *[""] * (len(headings) - 3), "text long"]
    head = "".join(f'<th scope="col" class="{k}">{escape(h)}</th>' for h, k in zip(headings, kinds, strict=True))
    body = ""
    for row in rows:
        cells = [cell if isinstance(cell, tuple) else (cell, "") for cell in row]
        small = [f"<br><small>{escape(said)}</small>" if said else "" for _, said in cells]
        columns = zip(cells, small, kinds, strict=True)
        cells = [f'<td class="{kind}">{escape(text)}{more}</td>' for (text, _), more, kind in columns]
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def checks(report):
    passed = [check for check in report.checks if check.outcome == PASS]
    return (
        f"<h2>Checks</h2>{listed(report.failed) or '<p>Nothing failed.</p>'}"
        f"<details><summary>{len(report.undecided)} undecided: add images</summary>{listed(report.undecided)}</details>"
        f"<details><summary>{len(passed)} passed</summary>{listed(passed)}</details>"
    )


def listed(checks):
    lines = [f"<li><b>{escape(f'{c.gate}, {c.target} {c.level}'.strip())}</b>: {escape(c.reason)}</li>" for c in checks]
    return f'<ul class="{checks[0].outcome}">{"".join(lines)}</ul>' if checks else ""


def figures(report):
    rows = []
    for row in report.figures.to_dict("records"):
        cells = [number(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in SHOWN]
        worst = row["worst_phrasing"] if isinstance(row["worst_phrasing"], str) else "-"
        rows.append([row["target"], row["level"], *cells, str(row["images"]), worst])
    return table(["target", "level", *HEADINGS.values(), "images", "worst phrasing"], rows)


def number(estimate, low, high):
    return "-" if np.isnan(estimate) else (f"{estimate:.3f}", f"{low:.3f} to {high:.3f}")


def words(report):
    gaps = [f"{r.target}: {r.levels} {interval(r.gap, r.gap_low, r.gap_high)} Dice" for r in report.gaps.itertuples()]
    foils = [
        f"{r.target}: {interval(r.separation, r.separation_low, r.separation_high)} Dice further off"
        for r in report.foils.itertuples()
    ]
    parts = (("Quality levels", gaps), ("Foils, which ask for something else", foils))
    return "".join(
        f"<h2>{heading}</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
        for heading, lines in parts
        if lines
    )


def pictures(result):
    """For the targets that agree least, the image on which they do."""
    from ..plots import png

    for target, example in sorted(result.examples.items(), key=lambda item: item[1].agreement)[:WORST]:
        figure, alt = show_example(target, example)
        data = base64.b64encode(png(figure, dpi=110, colours=128)).decode()
        caption = (
            f"{target}, image {example.image}: agreement {example.agreement:.2f} over {len(example.packed)} phrasings."
        )
        yield (
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}"><figcaption>{escape(caption)} '
            "Solid: the mask. Dashed: the true mask, where it is known.</figcaption></figure>"
        )


def show_example(target, example):
    """Figure and alt text: disagreement, the mask nearest to the majority, and the two furthest from it."""
    from ..plots import disagreement, outline, panels

    height, width = example.pixels.shape[:2]
    bits = np.unpackbits(example.packed.view(np.uint8), axis=-1)[:, : height * width]
    masks = bits.reshape(-1, height, width).astype(bool)  # [K, H, W]
    near = dice(example.packed, majority(example.packed))
    order = np.argsort(near, kind="stable")
    figure, axes = panels(4, columns=2)
    axes[0].imshow(disagreement(masks), cmap="magma", vmin=0, vmax=1)
    axes[0].set_title("disagreement", fontsize=8)
    shown = [*dict.fromkeys([order[-1], *order[:2]])]
    for axis, i in zip(axes[1:], shown, strict=False):
        outline(axis, example.pixels, masks[i], example.truth, example.phrasings[i])
    far = " and ".join(f"{example.phrasings[i]!r} with Dice {near[i]:.2f}" for i in shown[1:])
    alt = (
        f"Panels for {target} on image {example.image}: where the masks of {len(masks)} phrasings disagree, "
        f"then the outlined mask of {example.phrasings[shown[0]]!r}, nearest to the majority, and what is furthest "
        f"from it: {far}."
    )
    return figure, alt


def failures(result):
    if result.failures.empty:
        return f"<h2>Failed items</h2><p>None of {result.asked}.</p>"
    rows = result.failures.head(LISTED).to_numpy().tolist()
    said = f"<p>{len(result.failures)} of {result.asked}, the first {len(rows)} listed.</p>"
    return f"<h2>Failed items</h2>{said}{table(['image', 'phrasing', 'reason'], rows)}"
