"""Places at which a test may end the process, and nothing else.

``KDLIB_FAULT=save.moved:2`` kills the process, as ``kill -9`` does, when it comes to the point ``save.moved`` for the
second time; ``KDLIB_FAULT=step:5:TERM`` sends it SIGTERM there. Unset, a point costs one comparison.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    *("start", "resume", "batch", "backward", "step", "log", "evaluate", "best"),
    *("save.begin", "save.tensors", "save.tree", "save.manifest", "save.synced", "save.replaced", "save.moved"),
    *("save.pruned", "file.draft", "file.synced", "file.moved"),
)
_point, _count, _signal = "", 0, signal.SIGTERM


def arm(wanted: str | None) -> None:
    """Says where the process is to end: ``point:n`` or ``point:n:SIGNAL``; None takes it back.

    Raises:
        ValueError: not of this form, or no such point.
    """
    global _point, _count, _signal
    point, _, rest = (wanted or "").partition(":")
    number, _, name = rest.partition(":")
    if wanted and (point not in POINTS or not number.isdecimal() or int(number) < 1):
        raise ValueError(f"KDLIB_FAULT is point:n or point:n:SIGNAL, points are {', '.join(POINTS)} (got {wanted!r})")
    _point, _count = point, int(number or 0)
    _signal = getattr(signal, f"SIG{name or 'KILL'}", signal.SIGTERM)


def reach(point: str) -> None:
    """Called where the process may end."""
    global _count
    if _point == point:
        _count -= 1
        if _count == 0:
            os.kill(os.getpid(), _signal)


arm(os.environ.get("KDLIB_FAULT"))
