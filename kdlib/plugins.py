"""What installed packages register: losses and models that a config may then name.

A package says in its pyproject.toml:

    [project.entry-points."kdlib.plugins"]
    mine = "mypackage.distillation"

The module is imported before a config is read or a verb begins, and registers what it has by ``kdlib.losses.register``
and ``timm.models.register_model``. ``mypackage.distillation:register`` names a function, which is called without
arguments. Nothing but what is installed is imported: no config, file or argument adds a plugin.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from .config import ConfigError, one_line

GROUP, SWITCH = "kdlib.plugins", "KDLIB_PLUGINS"
"""``KDLIB_PLUGINS=off`` loads none, ``KDLIB_PLUGINS=mine,other`` these alone."""


@cache
def load_plugins() -> tuple[str, ...]:
    """Loads each plugin once and gives their names, sorted.

    Raises:
        ConfigError: one that cannot be loaded, or is asked for and not installed.
    """
    wanted = os.environ.get(SWITCH)
    if wanted == "off":
        return ()
    found = {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}
    names = list(found) if wanted is None else [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in found:
            known = ", ".join(found) or "none"
            raise ConfigError([f"{SWITCH}: no plugin {name!r} is installed (known: {known})"])
        try:
            made = found[name].load()
            if found[name].attr:
                made()
        except Exception as error:  # foreign code
            reason = one_line(error, 200)
            raise ConfigError(
                [
                    f"plugin {name!r} ({_whose(found[name])}, {found[name].value}) cannot be loaded "
                    f"({type(error).__name__}: {reason}); mend or uninstall it, or set {SWITCH}=off"
                ]
            ) from error
    return tuple(names)


def _whose(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "of no package"
