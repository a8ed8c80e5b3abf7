"""Measure how far the masks of any text-prompted model move with wording, and keep them from moving more.

    model   = adapt("lite" | "package.module:function" | "segment {image} {phrasing} {output}" | "https://...")
    result  = measure(model, data, bank, folder="answers")   # asked once, kept, resumed
    report  = Report(result, check_gates(result, load_baseline("baseline.json")))
    print(report.text())                                     # and .json(), .junit(), .html()

Nothing of the engine imports this. The names load on first use: pytest reads the plugin here at every start.
"""

from ..lazy import on_first_use

_HOME = {
    "adapt": "adapters",
    "measure": "measurement",
    "open_pictures": "measurement",
    "Measurement": "measurement",
    "dispersion": "summary",
    "alarms": "collapse",
    "check_gates": "gates",
    "save_baseline": "baseline",
    "load_baseline": "baseline",
    "Report": "report",
    "show_example": "page",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = on_first_use(__name__, _HOME)
