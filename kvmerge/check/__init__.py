"""The contract that every cache method must hold to, for a method from anywhere.

    python -m kvmerge.check my_package.MyMethod recent=8

The project's own methods are held to the same rules by its tests.
"""

from kvmerge.check.outcome import Outcome, outcomes
from kvmerge.check.rules import RULES, Broken, Rule

__all__ = ["RULES", "Broken", "Outcome", "Rule", "outcomes"]
