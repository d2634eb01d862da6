"""The official LongBench metrics, and how a prediction with several gold answers is scored.

Written from the published scorer's behaviour (THUDM/LongBench `LongBench/metrics.py` and
`eval.py`, commit 2e00731, MIT). Its oddities change published numbers, so they are kept and named
where they occur. Every function takes `(prediction, answer)` and returns a float from 0 to 1;
`classification` also takes the label set of its task.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import string
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher

from rouge import Rouge

from benchmarks.metric import Marks, Metric, best_of

PUNCTUATION = frozenset(string.punctuation)
PUNCTUATION_ZH = PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
"""A constant of the protocol, gaps included: `》` is in it, `《` is not."""


# Question answering


def normalize(text: str) -> str:
    """Lower-case `text`, delete ASCII punctuation, then articles, then spare whitespace.

    Punctuation vanishes without leaving a space: `U.S.` and `us` are the same word.
    """
    kept = _without(text.lower(), PUNCTUATION)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", kept).split())


def normalize_zh(text: str) -> str:
    """Lower-case `text`, delete ASCII and full-width punctuation and all whitespace."""
    return "".join(_without(text.lower(), PUNCTUATION_ZH).split())


def _without(text: str, unwanted: frozenset[str]) -> str:
    return "".join(character for character in text if character not in unwanted)


def token_f1(prediction: Iterable[str], answer: Iterable[str]) -> float:
    """Return the F1 of two bags of tokens; 0 without a common token, so also when both are empty."""
    predicted, wanted = Counter(prediction), Counter(answer)
    common = (predicted & wanted).total()
    if common == 0:
        return 0.0
    precision = common / predicted.total()
    recall = common / wanted.total()
    return (2 * precision * recall) / (precision + recall)


def qa_f1(prediction: str, answer: str) -> float:
    """Return the token F1 of the normalised words."""
    return token_f1(normalize(prediction).split(), normalize(answer).split())


def qa_f1_zh(prediction: str, answer: str) -> float:
    """Return the token F1 of the words that jieba finds, each normalised, empty ones dropped."""
    if not prediction:
        return 0.0  # before jieba is loaded: every row is checked with an empty prediction
    return token_f1(_normal_words_zh(prediction), _normal_words_zh(answer))


def _normal_words_zh(text: str) -> list[str]:
    return [word for word in map(normalize_zh, _cut()(text)) if word]


@functools.cache
def _cut() -> Callable[[str], Iterable[str]]:
    """Return jieba's segmenter (exact mode); it loads its dictionary, 0.5 s, at the first use."""
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it reports each step of loading on stderr
    return jieba.cut


# Summaries

GetScores = Callable[..., dict[str, dict[str, float]]]
"""`Rouge.get_scores`: metric name to its recall, precision and F."""


def rouge_l(prediction: str, answer: str) -> float:
    """Return the ROUGE-L F of the PyPI package `rouge`, which differs from Google's `rouge_score`.

    Whatever makes that package raise scores 0: a text without a sentence (empty, or dots alone),
    and sentences too long for its recursion, one call a word (so a sentence of 1,000 words scores
    0 against itself).
    """
    if not prediction:
        return 0.0  # as the package, which raises, but without a thread: every row is tried so
    return _rouge_l(Rouge(metrics=["rouge-l"]).get_scores, prediction, answer)


def rouge_zh(prediction: str, answer: str) -> float:
    """Return `rouge_l` of the words that jieba finds, joined by single spaces."""
    if not prediction:
        return 0.0  # as the package, which raises, but before jieba is loaded
    rouge = Rouge(metrics=["rouge-l"])

    def one_call_deeper(*texts: list[str], avg: bool) -> dict[str, dict[str, float]]:
        # The official scorer reaches ROUGE through one call more here than in English.
        return rouge.get_scores(*texts, avg=avg)

    return _rouge_l(one_call_deeper, " ".join(_cut()(prediction)), " ".join(_cut()(answer)))


class _FreshStack(threading.Thread):
    """ROUGE of one pair on an empty stack.

    `rouge` recurses once per word, and whether it overflows would depend on how deep its caller
    already is. Here it starts at the depth it has in the official `eval.py`.
    """

    def __init__(self, get_scores: GetScores, prediction: str, answer: str) -> None:
        super().__init__(daemon=True)
        self.get_scores = get_scores
        self.pair = [prediction], [answer]
        self.f = 0.0

    def run(self) -> None:
        with contextlib.suppress(Exception):  # the official rule: whatever goes wrong scores 0
            self.f = self.get_scores(*self.pair, avg=True)["rouge-l"]["f"]


def _rouge_l(get_scores: GetScores, prediction: str, answer: str) -> float:
    thread = _FreshStack(get_scores, prediction, answer)
    thread.start()
    thread.join()
    return thread.f


# Few-shot, synthetic and code tasks


def classification(prediction: str, answer: str, all_classes: Sequence[str] | None = None) -> float:
    """Return 1 / (class names found in the prediction) if the gold one is among them, else 0.

    A found name that is a proper part of the gold name is dropped first, but the official loop
    deletes from the list it walks, so the name after a dropped one is never looked at. That is
    kept: it halves the score of some right answers. Raises TypeError without `all_classes`.
    """
    if all_classes is None:
        raise TypeError("classification needs all_classes, the label set of the task")
    found = [name for name in all_classes if name in prediction]
    position = 0
    while position < len(found):
        name = found[position]
        if name in answer and name != answer:
            found.remove(name)
        position += 1
    return 1.0 / len(found) if answer in found else 0.0


def count(prediction: str, answer: str) -> float:
    """Return the share of the prediction's numbers that equal the gold number, as text; 0 if none."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Return `count` with the number in the gold's `Paragraph N`. Raises IndexError if it has none."""
    return count(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def retrieval_zh(prediction: str, answer: str) -> float:
    """Return `count` with the number in the gold's `段落N`. Raises IndexError if it has none."""
    return count(prediction, re.findall(r"段落(\d+)", answer)[0])


def code_sim(prediction: str, answer: str) -> float:
    """Return the similarity, in whole percents, of the gold line and the first that looks like code.

    Leading newlines are cut, then lines holding a backtick, `#` or `//` are passed over. A blank
    line after one of those counts as the answer, as in the official scorer.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    return _ratio()(next(code, ""), answer) / 100


@functools.cache
def _ratio() -> Callable[[str, str], int]:
    """Return `fuzzywuzzy.fuzz.ratio` on difflib's matcher.

    The package takes python-Levenshtein's matcher where that is installed, which gives other scores.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of difflib, which it calls slow
        from fuzzywuzzy import fuzz
    fuzz.SequenceMatcher = SequenceMatcher
    ratio: Callable[[str, str], int] = fuzz.ratio
    return ratio


def _classification(
    prediction: str, answers: Iterable[str], all_classes: Sequence[str] | None = None
) -> Marks:
    compare = functools.partial(classification, all_classes=all_classes)
    return best_of(compare, without=0.0)(prediction, answers)


QA_F1, QA_F1_ZH, ROUGE_L, ROUGE_ZH, COUNT, RETRIEVAL, RETRIEVAL_ZH, CODE_SIM = (
    Metric(compare.__name__, best_of(compare, without=0.0))
    for compare in (
        qa_f1,
        qa_f1_zh,
        rouge_l,
        rouge_zh,
        count,
        retrieval,
        retrieval_zh,
        code_sim,
    )
)
CLASSIFICATION = Metric("classification", _classification)

METRICS = (
    QA_F1,
    QA_F1_ZH,
    ROUGE_L,
    ROUGE_ZH,
    CLASSIFICATION,
    COUNT,
    RETRIEVAL,
    RETRIEVAL_ZH,
    CODE_SIM,
)
"""The best over the gold answers, 0 if there are none; each raises what its function raises."""
