"""Read the records of a run, and make a small table: the mean of a figure by task and cell.

python examples/read_records.py results/runs/mini/mini/smollm2-135m --figure kl_to_full
"""

import argparse
from pathlib import Path

import pandas as pd


def read(output_dir: Path) -> pd.DataFrame:
    """Return a line a sample and cell, of a sharded run too; the folder and the file name the two."""
    files = sorted(output_dir.rglob("predictions/*/*.jsonl"))
    if not files:
        raise SystemExit(f"{output_dir} holds no records; `python run.py experiment=mini` makes some.")
    # as written: pandas would take an id or an answer that looks like a number or date for one
    frames = [pd.read_json(file, lines=True, dtype=False, convert_dates=False) for file in files]
    named = zip(files, frames, strict=True)
    return pd.concat([frame.assign(task=file.parent.name, cell=file.stem) for file, frame in named])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument(
    "output_dir", type=Path, nargs="?", default=Path("results/runs/mini/mini/smollm2-135m")
)
parser.add_argument("--figure", default="score", help="a number of every record, e.g. kept_entries")

if __name__ == "__main__":
    options = parser.parse_args()
    records = read(options.output_dir)
    records[options.figure] = records[options.figure].astype(float)
    print(f"{len(records)} records; mean {options.figure}:\n")
    table = records.pivot_table(options.figure, "task", "cell", margins=True, margins_name="mean")
    print(table.round(3).to_string())
