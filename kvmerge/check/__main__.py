"""Try a method on the contract: `python -m kvmerge.check my_package.MyMethod recent=8`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kvmerge.command import exits


@exits
def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a rule, and return the exit status.

    Returns:
        0: the method holds to every rule; 1: it breaks one; 2: a user error, printed as one message.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kvmerge.check",
        description="Hold a cache method against the contract that every method must keep, on tiny "
        "random models: a line a rule, and on failure what was expected and what came.",
    )
    parser.add_argument("method", help="a method's name, or a class: my_package.MyMethod")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="settings of the method")
    parser.add_argument(
        "--config-dir",
        "-cd",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of your own choices, DIR/method/<name>.yaml; may be repeated",
    )
    given = parser.parse_args(argv)
    return check(given.method, given.settings, given.config_dir)


def check(name: str, settings: Sequence[str], folders: Sequence[str]) -> int:
    """Print what comes of each rule, and return 1 if one is broken, else 0.

    Raises:
        UserError: if there is no such method or setting, or a value is not allowed.
    """
    import torch  # late: it takes seconds, and --help needs none of it

    from kvmerge.cells import read_options
    from kvmerge.check.outcome import outcomes
    from kvmerge.places import config_dirs
    from kvmerge.resolve import load_method

    torch.set_num_threads(1)  # tensors are tiny: threads would wait for each other
    with config_dirs(folders):
        method = load_method(name, read_options(settings, f"the settings of {name}"))
        print(method)
        counts = {"holds": 0, "BROKEN": 0, "-": 0}
        for outcome in outcomes(method):
            word = "-" if outcome.excuse else "BROKEN" if outcome.fault else "holds"
            counts[word] += 1
            print(f"  {word:<6}  {outcome.rule.says}", flush=True)
            for line in filter(None, (outcome.fault, outcome.excuse, *outcome.notes)):
                print(f"          {line}")
    print(f"{counts['holds']} rules hold, {counts['BROKEN']} are broken, {counts['-']} are not for it.")
    return min(1, counts["BROKEN"])


if __name__ == "__main__":
    sys.exit(main())
