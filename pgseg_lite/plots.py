"""Pictures of masks and of their disagreement. Every function returns a matplotlib Figure."""

import io
import textwrap

import matplotlib.pyplot as plt
import numpy as np

from .errors import SettingsError

TRUE_COLOUR, MASK_COLOUR = "#009e73", "#e60049"  # told apart without colour vision too: truth is dashed
# One colour a method, throughout the book; told apart without colour vision (Okabe and Ito).
METHOD_COLOURS = {
    "one fixed phrasing": "#d55e00",
    "one random phrasing": "#e69f00",
    "K phrasings, L_seg only": "#009e73",
    "w/o L_group, L_cons": "#009e73",
    "full method": "#0072b2",
    "prompt groups": "#0072b2",
}
OTHER_COLOUR, PAPER_COLOUR = "#555555", "#777777"
PANEL, TITLE_WIDTH = 2.2, 34  # inches a panel, characters a line of its title


def panels(count, columns=None):
    """A white figure with `count` bare square axes, as a flat list."""
    columns = columns or min(count, 5)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(PANEL * columns, (PANEL + 0.35) * rows), squeeze=False, layout="constrained",
        facecolor="white",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    plt.close(figure)  # shown once, by whoever asked for it, and not a second time by the notebook
    return figure, list(axes.flat[:count])


def outline(axis, image, mask=None, truth=None, title=""):
    """The image with a solid line around the mask and a dashed one around the truth."""
    axis.imshow(image)
    for shape, colour, style in ((truth, TRUE_COLOUR, "dashed"), (mask, MASK_COLOUR, "solid")):
        if shape is not None and shape.any():
            axis.contour(shape, levels=[0.5], colors=colour, linestyles=style, linewidths=1.0)
    lines = [textwrap.fill(line, TITLE_WIDTH) for line in title.splitlines()]
    axis.set_title("\n".join(lines), fontsize=8)


def show_masks(image, masks, titles, truth=None, columns=3):
    """One panel a mask: image uint8 [H, W, 3], masks bool [K, H, W], K titles; dashed is the truth."""
    if len(masks) != len(titles):
        raise SettingsError(f"{len(masks)} masks and {len(titles)} titles; give one title a mask")
    figure, axes = panels(len(masks), min(len(masks), columns))
    for axis, mask, title in zip(axes, masks, titles, strict=True):
        outline(axis, image, mask, truth, title)
    return figure


def show_samples(samples, targets):
    """A row a sample: the image, then the true mask of each target."""
    figure, axes = panels(len(samples) * (1 + len(targets)), columns=1 + len(targets))
    for row, sample in enumerate(samples):
        first = row * (1 + len(targets))
        outline(axes[first], sample.image, title=sample.id)
        for axis, target in zip(axes[first + 1 :], targets, strict=False):
            outline(axis, sample.image, truth=sample.masks[target], title=target)
    return figure


def disagreement(masks):
    """Per pixel, how split a group is: 0 where all K masks agree, 1 where half of them differ. [K, H, W] -> [H, W]."""
    share = np.asarray(masks, dtype=float).mean(axis=0)
    return 4 * share * (1 - share)


def show_disagreement(image, groups, titles):
    """The image, then a map for each group of masks [K, H, W]: bright where phrasings disagree."""
    figure, axes = panels(1 + len(groups))
    outline(axes[0], image, title="image")
    for axis, masks, title in zip(axes[1:], groups, titles, strict=True):
        picture = axis.imshow(disagreement(masks), cmap="magma", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)
    figure.colorbar(picture, ax=axes, shrink=0.7, label="disagreement (1 = split in half)")
    return figure


def show_history(history):
    """The loss terms over the steps of a run, a panel a term."""
    terms = ("seg", "mask", "dice", "presence", "group", "consistency")
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.2), layout="constrained", facecolor="white")
    for axis, term in zip(axes.flat, terms, strict=True):
        axis.plot(history["step"], history[term], color="#20639b", marker=".", markersize=3)
        axis.set_title(term, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    plt.close(figure)
    return figure


def show_methods(compared, seeds, measure="dice", paper=None, xlabel="Dice (%)"):
    """Each method's mean with its 95 % interval, a dot a seed; a panel a task.

    compared: rows of `tables.compare` for one test, in percent. seeds: `tables.scores` of the same, in percent.
    paper: {method: {task: figure}} is drawn as hollow diamonds.
    """
    import seaborn as sns

    rows, seeds = compared[compared["measure"] == measure], seeds[seeds["measure"] == measure]
    methods, tasks = list(rows["method"].unique()), list(rows["task"].unique())
    figure, axes = rows_of_methods(methods, len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        part = rows[rows["task"] == task].set_index("method")
        dots = seeds[seeds["task"] == task]
        sns.stripplot(dots, x="value", y="method", order=methods, color="black", size=3, jitter=0, ax=axis, zorder=4)
        for y, method in enumerate(methods):
            row, colour = part.loc[method], METHOD_COLOURS.get(method, OTHER_COLOUR)
            axis.plot([row["low"], row["high"]], [y, y], color=colour, lw=2, solid_capstyle="round")
            axis.plot(row["value"], y, "o", color=colour, ms=7)
            axis.annotate(
                f"{row['value']:.1f}", (row["value"], y), (0, 9), textcoords="offset points", ha="center", fontsize=8
            )
            if printed := (paper or {}).get(method, {}).get(task):
                axis.plot(printed, y, "D", mfc="none", mec=PAPER_COLOUR, ms=9, mew=1.5)
        axis.set(title=task, xlabel=xlabel, ylabel="")
    return figure


def show_differences(compared, reference, measure="dice", xlabel="difference in Dice (points)"):
    """Each method minus the reference with its 95 % interval; filled where that is decided, hollow where it is not."""
    rows = compared[(compared["measure"] == measure) & (compared["method"] != reference)]
    methods, tasks = list(rows["method"].unique()), list(rows["task"].unique())
    figure, axes = rows_of_methods(methods, len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        part = rows[rows["task"] == task].set_index("method")
        axis.axvline(0, color="black", lw=0.8)
        for y, method in enumerate(methods):
            if method not in part.index:
                continue
            row, colour = part.loc[method], METHOD_COLOURS.get(method, OTHER_COLOUR)
            face = "white" if row["verdict"] == "undecided" else colour
            axis.plot([row["difference_low"], row["difference_high"]], [y, y], color=colour, lw=2, zorder=1)
            axis.plot(row["difference"], y, "o", mfc=face, mec=colour, ms=7, mew=1.5)
            label, place = f"{row['difference']:+.1f}", (row["difference"], y)
            axis.annotate(label, place, (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axis.set(title=f"{task}, minus {reference}", xlabel=xlabel, ylabel="")
    return figure


def rows_of_methods(methods, count):
    """A white figure with `count` panels side by side that share a row for each method, the first on top."""
    size = (4.4 * count + 0.6, 0.42 * len(methods) + 1.1)
    figure, axes = plt.subplots(
        1, count, figsize=size, sharey=True, squeeze=False, layout="constrained", facecolor="white"
    )
    for axis in axes.flat:
        axis.set_yticks(range(len(methods)), methods, fontsize=9)
        axis.set_ylim(len(methods) - 0.5, -0.7)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    plt.close(figure)
    return figure, list(axes.flat)


def settled(figure):
    """The figure after one more round of its layout: one is too few for square panels under titles of two lines."""
    engine = figure.get_layout_engine()
    if engine and any(axis.get_aspect() != "auto" for axis in figure.axes):
        engine.execute(figure)
    return figure


def png(figure, dpi=100, colours=None):
    """The figure as the bytes of a PNG file; with a palette of 256 `colours`, tissue takes a third of them."""
    buffer = io.BytesIO()
    settled(figure).savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    if colours:
        from PIL import Image

        picture = Image.open(buffer).convert("RGB").quantize(colours)
        picture.save(buffer := io.BytesIO(), "PNG", optimize=True)
    return buffer.getvalue()


def show(figure, alt, colours=None):
    """Put the figure into a notebook with a text for readers who do not see it."""
    from IPython.display import display

    if not alt.strip():
        raise SettingsError("a figure needs an alt text: say in a sentence what it shows")
    data = {"image/png": png(figure, colours=colours), "text/plain": alt}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)
