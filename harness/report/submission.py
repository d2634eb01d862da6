"""Write the predictions of a ZeroSCROLLS test run in the form that the leaderboard takes.

python -m harness.report.submission results/runs/paper_zeroscrolls/zero_scrolls_test/llama2-7b-chat

The test answers are withheld, so a test run is scored by submission alone: one CSV file a cell with
columns Task, ID and Prediction, holding every test sample of all ten tasks once. What is checked
here is what the official checker demands (tau-nlp/zero_scrolls `submission/`, commit c994676).
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.zero_scrolls.tasks import TASKS
from harness.report.run import Run, load_run
from kvmerge.command import exits
from kvmerge.errors import UserError
from kvmerge.files import write_atomically
from kvmerge.names import file_name

logger = logging.getLogger(__name__)

BENCHMARK = "zero_scrolls_test"
"""Name of the benchmark on its test split."""

COLUMNS = ["Task", "ID", "Prediction"]

_NOT_A_VALUE = "!@#$%^&*()"
"""The one text that the official checker reads as a missing prediction."""


@exits
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user error prints one message and gives exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.report.submission", description=__doc__.split("\n")[0]
    )
    parser.add_argument("output_dir", type=Path, help="folder that a run on the test split wrote")
    written, missing = write_submissions(load_run(parser.parse_args(argv).output_dir))
    for path in written:
        print(path)
    if missing:
        raise UserError("\n".join(missing))
    return 0


def report_submissions(run: Run) -> None:
    """Write the submissions of a test run's complete cells, and log them and what others lack.

    Do nothing for a run of another benchmark.
    """
    if run.benchmark != BENCHMARK:
        return
    written, missing = write_submissions(run)
    for path in written:
        logger.info("submission: %s", path)
    for message in missing:
        logger.warning(message)


def write_submissions(run: Run) -> tuple[list[Path], list[str]]:
    """Write `submissions/<cell>.csv` in the run's output_dir for each complete cell.

    Return the paths, and for each other cell what is wrong with it. Raises `UserError` if the run is
    not of the test split.
    """
    if run.benchmark != BENCHMARK:
        raise UserError(
            f"{run.output_dir} holds {run.benchmark}; a submission is made of {BENCHMARK} "
            f"(benchmark=zero_scrolls benchmark.split=test)."
        )
    written, missing = [], []
    for cell in run.cells:
        try:
            content = submission(run, cell)
        except UserError as error:
            missing.append(str(error))
            continue
        path = run.output_dir / "submissions" / f"{file_name(cell)}.csv"
        write_atomically(path, content)
        written.append(path)
    return written, missing


def submission(run: Run, cell: str) -> str:
    """Return a cell's submission as CSV; of a cell with several seeds, its first seed's answers.

    Raises `UserError` naming the tasks that are missing or incomplete, or a prediction that would not
    be read back as it was written.
    """
    by_task = {task.name: run.records.get((task.name, cell), []) for task in TASKS}
    seed = min((record.seed for records in by_task.values() for record in records), default=0)
    rows: list[tuple[str, str, str]] = []
    lacking = []
    for task, records in by_task.items():
        answers = [(task, r.id, r.prediction) for r in records if r.seed == seed]
        wanted = run.info["tasks"].get(task, {}).get("samples")
        if wanted is None:
            lacking.append(f"{task} (not run)")
        elif len(answers) != wanted:
            lacking.append(f"{task} ({len(answers)} of {wanted} predictions)")
        rows += answers
    if lacking:
        raise UserError(
            f"{cell} in {run.output_dir} is not complete, so there is no submission. It lacks "
            f"{', '.join(lacking)}. Run all ten tasks into this output_dir, without limit."
        )
    # All fields quoted: unquoted, a carriage return would end a line.
    content = pd.DataFrame(rows, columns=COLUMNS, dtype=object).to_csv(
        index=False, lineterminator="\n", quoting=csv.QUOTE_ALL
    )
    _check(content, rows, cell)
    return str(content)


def _check(content: str, rows: Sequence[tuple[str, str, str]], cell: str) -> None:
    """Refuse a file that the official checker would read otherwise than it was meant."""
    table = pd.read_csv(
        io.StringIO(content, newline=""),
        dtype=object,
        keep_default_na=False,
        na_values=[_NOT_A_VALUE],
    )
    for row, read in zip(rows, table.itertuples(index=False, name=None), strict=True):
        if read != row:
            raise UserError(
                f"{cell} cannot be submitted: task {row[0]}, sample {row[1]!r} has the prediction "
                f"{row[2]!r}, which the official checker reads as {read[2]!r}."
            )
