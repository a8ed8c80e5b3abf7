"""Measure how far the masks of any text-prompted model move with wording, and keep them from moving more.

    model   = adapt("lite" | "package.module:function" | "segment {image} {phrasing} {output}" | "https://...")
    result  = measure(model, data, bank, folder="answers")   # asked once, kept, resumed
    report  = Report(result, check_gates(result, load_baseline("baseline.json")))
    print(report.text())                                     # and .json(), .junit(), .html()

Nothing of the engine imports this. The names load on first use: pytest reads the plugin here at every start.
"""

from importlib import import_module

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


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
