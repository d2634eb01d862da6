"""How a filled prompt becomes token ids: by LongBench's own protocol, or by that of a fork.

Much of the KV-cache literature was measured with KVCache-Factory (Zefan-Cai/KVCache-Factory,
`run_longbench.py` at commit c97f9d7). Its templates, answer lengths and metrics are LongBench's; its
prompts are not. The profile `kcf` gives such numbers something to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.encoding import encode_truncating_middle
from benchmarks.task import PromptFormat, Task
from kvmerge.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KCF_LLAMA2_LENGTH = 3950
"""Tokens of a Llama-2 prompt, its wrap included."""
KCF_LLAMA2_WRAP = "[INST] {prompt} [/INST]"
LLAMA2_CONTEXT = 4096


@dataclass(frozen=True)
class Profile:
    """One protocol."""

    name: str
    encode: Callable[[PreTrainedTokenizerBase, str, Task, PromptFormat], list[int]]
    """From tokenizer, filled prompt, task and the model's format to what is fed to prefill."""
    min_new_tokens: int = 0
    """Tokens before which no answer of any task ends."""
    may_overrun: bool = False
    """Whether its prompts leave less than the answer's room in the model's context."""
    notes: tuple[str, ...] = ()
    """What a reader of its results must know."""

    def adapt(self, task: Task) -> Task:
        """Return a task as this protocol runs it."""
        return replace(
            task,
            min_new_tokens=max(task.min_new_tokens, self.min_new_tokens),
            may_overrun=self.may_overrun,
        )


def _encode_official(
    tokenizer: PreTrainedTokenizerBase, prompt: str, task: Task, fmt: PromptFormat
) -> list[int]:
    return encode_truncating_middle(tokenizer, prompt, fmt, wrap=task.chat)


def _encode_kcf(
    tokenizer: PreTrainedTokenizerBase, prompt: str, task: Task, fmt: PromptFormat
) -> list[int]:
    """Encode as KVCache-Factory, which goes by the model's path, as far as its format tells.

    A format `[INST]...` with a context of 4,096 is Llama-2: wrapped, then cut. One with a longer
    context is Mistral: cut, and not wrapped at all. Any other is encoded as LongBench does.
    """
    if not fmt.chat.startswith("[INST]"):
        return _encode_official(tokenizer, prompt, task, fmt)
    if fmt.context is None:
        raise UserError(
            "benchmark.profile=kcf tells Llama-2 from Mistral by model.context, which is not stated. "
            f"Give it, e.g. model.context={LLAMA2_CONTEXT}, or use benchmark.profile=official."
        )
    if fmt.context == LLAMA2_CONTEXT:
        prompt = KCF_LLAMA2_WRAP.replace("{prompt}", prompt)
        fmt = replace(fmt, max_length=KCF_LLAMA2_LENGTH)
    return encode_truncating_middle(tokenizer, prompt, fmt, wrap=False)


_PROFILES = {
    profile.name: profile
    for profile in (
        Profile("official", _encode_official),
        Profile(
            "kcf",
            _encode_kcf,
            min_new_tokens=1,
            may_overrun=True,
            notes=(
                "Profile kcf: prompts as in KVCache-Factory (commit c97f9d7), not as in LongBench, so "
                "scores compare with that repository's only. Llama-2: wrapped as `[INST] ... [/INST]` "
                "before the cut to 3,950 tokens (whatever model.max_length says), few-shot and code "
                "tasks too. Mistral: cut to model.max_length, not wrapped. Others: as in LongBench.",
                "KVCache-Factory wraps Llama-2 only where the model's path contains `llama2`; its runs "
                "from `Llama-2-7b-chat-hf` have no wrap. Its Llama-3 format (7,500 tokens) is not "
                "reproduced, and it has none of the five Chinese tasks.",
            ),
        ),
    )
}


def find_profile(name: str) -> Profile:
    """Return the profile called `name`. Raises UserError listing the profiles if there is none."""
    if name not in _PROFILES:
        raise unknown("LongBench profile", name, _PROFILES)
    return _PROFILES[name]
