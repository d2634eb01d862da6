"""The margin within which two scores count as equivalent: a matter of the report alone."""

from __future__ import annotations

import math

from kvmerge.errors import UserError

MARGIN = 1.0
"""Points, of scores 0 to 100, unless `margin=` is given."""


def check_margin(margin: float, name: str = "margin=") -> float:
    """Return a margin. Raises `UserError` unless it is a finite number above 0."""
    if not 0 < margin < math.inf:
        raise UserError(
            f"{name}{margin:g} must be a number of points above 0: two scores that differ by less "
            f"count as equivalent. Leave it out for {MARGIN:g}."
        )
    return margin
