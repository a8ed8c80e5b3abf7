"""Names of a package that load on first use, so that importing the package costs nothing."""

import sys
from importlib import import_module


def on_first_use(package, home):
    """The `__getattr__` and `__dir__` of a package; `home` says in which of its modules each name lives."""
    known = vars(sys.modules[package])

    def getattribute(name):
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        known[name] = getattr(import_module(f".{home[name]}", package), name)
        return known[name]

    return getattribute, lambda: [*known, *home]
