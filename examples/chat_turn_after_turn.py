"""Go on with a chat from its compressed cache, and see at each turn what was compressed.

python examples/chat_turn_after_turn.py --recompress each_turn --questions "Who may copy it?" "Where?"
"""

import argparse
from pathlib import Path

import torch

from harness.settings import compose
from kvmerge import compressed
from kvmerge.models import load

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--model", default="smollm2-135m", help="a name in configs/model")
parser.add_argument("--method", default="kvmerger", help="a name in configs/method")
parser.add_argument("--budget", default="0.35", help="a fraction of the prompt, or entries per KV head")
parser.add_argument("--recompress", default="never", choices=["never", "each_turn"])
parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "LICENSE")
parser.add_argument("--questions", nargs="+", default=["What is permitted?", "Under which condition?"])
parser.add_argument("--max-new-tokens", type=int, default=40)


def rendered(tokenizer, *contents):
    """Return a chat of user and assistant in turns as the tokenizer's template writes it."""
    roles = ["user", "assistant"] * len(contents)
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def turn(tokenizer, question):
    """Return what the template writes between an answer and the next."""
    return rendered(tokenizer, "-", "THE ANSWER", question).rpartition("THE ANSWER")[2]


if __name__ == "__main__":
    options = parser.parse_args()
    model, tokenizer = load(compose([f"model={options.model}"]).model)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    first, *others = options.questions
    text = options.text.read_text(encoding="utf-8")
    turns = [rendered(tokenizer, f"{text}\n\n{first}"), *(turn(tokenizer, each) for each in others)]
    ids, cache = torch.empty((1, 0), dtype=torch.long, device=model.device), {}

    with compressed(model, options.method, options.budget, recompress=options.recompress) as c:
        for question, written in zip(options.questions, turns, strict=True):
            new = tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"]
            # the answers' ids as they were generated: encoding their text may give others
            ids = torch.cat([ids, new.to(model.device)], dim=1)
            settings["attention_mask"] = torch.ones_like(ids)
            out = model.generate(ids, return_dict_in_generate=True, **cache, **settings)
            name = "cache" if "cache" in out else "past_key_values"  # before transformers 5.20
            cache = {name: out[name]}
            print(f"> {question}")
            print(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True))
            ids = out.sequences
            if ids[0, -1] == tokenizer.eos_token_id:
                ids = ids[:, :-1]  # the template writes it
    print(f"\n{c}")
