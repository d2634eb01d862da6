"""Compare methods on prompts of your own, and get a pandas.DataFrame.

python examples/compare_methods.py --cells full@1 tova@0.2 kvmerger@0.2 --prompts "One text" "Another"
"""

import argparse
import csv
from pathlib import Path

from harness.settings import compose
from kvmerge import compare
from kvmerge.models import load

LICENCE = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
PROMPTS = [
    f"{LICENCE}\n\nWhat must be included in all copies?",
    f"{LICENCE}\n\nWho is not liable for any claim?",
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--model", default="smollm2-135m", help="a name in configs/model")
parser.add_argument("--cells", nargs="+", default=["full@1", "h2o@0.5", "cam@0.5", "kvmerger@0.5"])
parser.add_argument("--prompts", nargs="+", default=PROMPTS)
parser.add_argument("--max-new-tokens", type=int, default=40)
parser.add_argument("--csv", type=Path, help="write the whole table there")

if __name__ == "__main__":
    options = parser.parse_args()
    # any transformers model and tokenizer do; this loads one by its name here
    model, tokenizer = load(compose([f"model={options.model}"]).model)
    table = compare(
        model, tokenizer, options.prompts, options.cells, max_new_tokens=options.max_new_tokens
    )
    figures = ["kept_entries", "kv_bytes", "kl_to_full", "top1_agreement"]
    print(table.groupby("cell", sort=False)[figures].mean().round(3).to_string(), "\n")
    for answer in table.itertuples():
        print(f"prompt {answer.prompt}, {answer.cell}: {answer.text!r}")
    if options.csv:
        # an answer may hold anything, a carriage return alone included
        table.to_csv(options.csv, index=False, quoting=csv.QUOTE_NONNUMERIC)
