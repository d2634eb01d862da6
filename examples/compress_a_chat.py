"""Compress the cache of a chat in plain transformers: generate() as ever, a third of the memory.

python examples/compress_a_chat.py --method h2o --budget 0.2 --text book.txt --question "Who did it?"
"""

import argparse
from pathlib import Path

from harness.settings import compose
from kvmerge import compressed
from kvmerge.models import load

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--model", default="smollm2-135m", help="a name in configs/model")
parser.add_argument("--method", default="kvmerger", help="a name in configs/method")
parser.add_argument("--budget", default="0.35", help="a fraction of the prompt, or entries per KV head")
parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "LICENSE")
parser.add_argument("--question", default="What must be included in all copies?")
parser.add_argument("--max-new-tokens", type=int, default=60)

if __name__ == "__main__":
    options = parser.parse_args()
    # any transformers model and tokenizer do; this loads one by its name here
    model, tokenizer = load(compose([f"model={options.model}"]).model)
    text = options.text.read_text(encoding="utf-8")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{text}\n\n{options.question}"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)

    with compressed(model, method=options.method, budget=options.budget) as c:
        ids = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)

    kept = c.last.rows[0]
    print(tokenizer.decode(ids[0, kept.prompt_tokens :], skip_special_tokens=True))
    print(f"\n{kept.prompt_tokens} prompt tokens, {kept.kept_entries:.1f} entries per KV head kept,")
    print(f"{kept.kv_bytes / 2**20:.2f} of {kept.kv_bytes_full / 2**20:.2f} MiB of keys and values")
