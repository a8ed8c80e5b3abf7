"""Interaction twice: frames that move in a static page, and live widgets for those with a kernel."""

import base64
import html
import io
import json
from itertools import count

from .errors import SettingsError

MAX_FRAMES, MAX_BYTES = 12, 500_000
_numbers = count(1)


def slider(figures, labels, alts, name, start=0):
    """Plain HTML with a few lines of script: a range input that switches between pre-rendered figures.

    Works without a kernel, a network or a mouse (arrow keys move a focused slider), and announces each
    frame's own alt text. At most 12 frames and 500 kB in all. It opens at frame `start`.
    """
    from IPython.display import HTML

    if not len(figures) == len(labels) == len(alts):
        raise SettingsError(f"{len(figures)} figures, {len(labels)} labels, {len(alts)} alt texts; give each frame one")
    if not 1 < len(figures) <= MAX_FRAMES:
        raise SettingsError(f"{len(figures)} frames; a slider takes 2 to {MAX_FRAMES}")
    frames = [jpeg_url(figure) for figure in figures]
    if (size := sum(map(len, frames))) > MAX_BYTES:
        raise SettingsError(f"the frames take {size // 1000} kB of {MAX_BYTES // 1000}; make the figures smaller")
    key = f"pgseg-slider-{next(_numbers)}"
    data = json.dumps([{"src": s, "label": t, "alt": a} for s, t, a in zip(frames, labels, alts, strict=True)])
    data = data.replace("</", "<\\/")  # a label must not end the script
    first, label, alt = frames[start], html.escape(labels[start]), html.escape(alts[start], quote=True)
    return HTML(f"""<figure class="pgseg-slider" id="{key}" style="background:#fff;color:#111;padding:.5em">
<label>{html.escape(name)}: <output>{label}</output>
<input type="range" min="0" max="{len(frames) - 1}" value="{start}" style="width:100%" aria-valuetext="{label}"></label>
<img src="{first}" alt="{alt}" style="max-width:100%;height:auto">
<script type="application/json">{data}</script>
<script>(() => {{
  const box = document.getElementById("{key}"), input = box.querySelector("input");
  const frames = JSON.parse(box.querySelector("script").textContent);
  input.addEventListener("input", () => {{
    const frame = frames[input.value], image = box.querySelector("img");
    image.src = frame.src; image.alt = frame.alt;
    box.querySelector("output").textContent = frame.label;
    input.setAttribute("aria-valuetext", frame.label);
  }});
}})();</script></figure>""")


def jpeg_url(figure):
    """Tissue does not compress as PNG: a dozen frames would not fit a page."""
    from .plots import settled

    buffer = io.BytesIO()
    settled(figure).savefig(buffer, format="jpeg", dpi=200, facecolor="white", pil_kwargs={"quality": 85})
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def live(draw, **controls):
    """Controls, and under them the figure that `draw(**values)` returns with its alt text. Needs a running kernel.

    The figure is an image in an HTML widget: unlike an Output widget it keeps its alt text and waits for no messages.
    """
    import ipywidgets

    picture = ipywidgets.HTML()

    def redraw(_=None):
        figure, alt = draw(**{name: control.value for name, control in controls.items()})
        alt, width = html.escape(alt, quote=True), round(96 * figure.get_figwidth())
        picture.value = f'<img src="{jpeg_url(figure)}" alt="{alt}" style="width:{width}px;max-width:100%">'

    for name, control in controls.items():
        control.description = control.description or name
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*controls.values(), picture])


def ask(model, image, prompt="nuclei"):
    """A text field and the mask for whatever is typed into it. Needs a running kernel."""
    import ipywidgets

    from .plots import show_masks

    features = model.encode_image(image)  # once: each phrasing costs only its own decoding

    def draw(phrasing):
        text = phrasing.strip() or prompt
        mask = model.decode(features, model.encode_text([text])).masks[0].cpu().numpy()
        return show_masks(image, mask, [text]), f"Outline of the mask for the phrasing: {text}"

    return live(draw, phrasing=ipywidgets.Text(value=prompt, continuous_update=False))
