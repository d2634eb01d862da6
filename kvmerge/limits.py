"""How long a text may be: a model's positions, its window, and where its RoPE changes."""

from __future__ import annotations

from transformers import PretrainedConfig

from kvmerge.errors import UserError
from kvmerge.families import rope_parameters, text_config, windows


def check_fits(
    config: PretrainedConfig,
    prompt: int,
    answer: int,
    *,
    context: int | None = None,
    may_overrun: bool = False,
) -> None:
    """Refuse a text that a model would not treat as one text.

    Args:
        config: the model's.
        prompt: tokens of the prompt.
        answer: the most tokens of the answer.
        context: positions that may be used; None: those of the model.
        may_overrun: whether positions past the model's may be used, as some protocols do.

    Raises:
        UserError: naming the limit, the lengths, and what to change.
    """
    kind = text_config(config).model_type
    has = f"the prompt has {prompt} and the answer up to {answer}"
    shorter = "Shorten the prompt (model.max_length)"
    limits = [limit for limit in (positions(config), context) if limit is not None]
    if limits and prompt + answer > min(limits) and not may_overrun:
        raise UserError(f"{kind} has {min(limits)} positions; {has}. {shorter} or the answer.")
    reach = windows(config)
    if None not in reach and prompt + answer > (window := min(each or 0 for each in reach)):
        raise UserError(
            f"{kind} attends only within a sliding window of {window} tokens; {has}. {shorter} or "
            "choose a model without a sliding window."
        )
    for parameters in rope_parameters(config):
        rope = parameters["rope_type"]
        if rope == "dynamic" and prompt + answer >= (
            top := text_config(config).max_position_embeddings
        ):
            raise UserError(
                f"{kind}'s dynamic RoPE turns each token by the longest text seen so far beyond {top} "
                f"tokens, so that cached keys disagree; {has}. {shorter} or use another rope_type."
            )
        if rope == "longrope":
            original = int(parameters["original_max_position_embeddings"])
            if prompt <= original < prompt + answer:
                raise UserError(
                    f"{kind}'s longrope changes its factors after {original} tokens, within this "
                    f"answer; {has}. Shorten the prompt to {original - answer} tokens "
                    "(model.max_length), or make it longer than that."
                )


def positions(config: PretrainedConfig) -> int | None:
    """Return the tokens that a model was made for, its RoPE's extension among them; None: not said.

    A few configurations keep the length before the extension; then its factor counts.
    """
    stated = getattr(text_config(config), "max_position_embeddings", None)
    if stated is None:
        return None
    extended = [
        int(float(each["factor"]) * each["original_max_position_embeddings"])
        for each in rope_parameters(config)
        if each.get("factor") and each.get("original_max_position_embeddings")
    ]
    return max([int(stated), *extended])


def is_past_the_switch(config: PretrainedConfig, length: int) -> bool:
    """Return whether a text of this length is turned by longrope's other factors.

    The rotation has one set of factors for a whole batch: texts of both kinds must not share one.
    """
    return any(
        each["rope_type"] == "longrope" and length > each["original_max_position_embeddings"]
        for each in rope_parameters(config)
    )
