"""Command lines of every kind: each is the settings of a run, or one message."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from harness.settings import Settings, compose
from kvmerge.errors import UserError
from kvmerge.places import choices, config_dir
from tests.conftest import Output
from tests.fuzz import yields

TRIALS, CHUNKS = 2_000, 20
GROUPS = {
    "model": ["tiny-random", "smollm2-135m", "llama2-7b-chat"],
    "benchmark": ["mini", "needle", "perplexity", "zero_scrolls", "longbench", "custom"],
    "method": choices("method"),
    "experiment": choices("experiment"),
}
GOOD = (
    *("budget=0.35", "budget=100", "limit=1", "seed=3", "num_seeds=2", "fidelity=false"),
    *("layers_skip=[0,1,-1]", "decode_policy=hold", "pos=rolled", "batch_size=auto", "batch_size=2"),
    *("cells=[full@1,h2o@0.5]", "cells=['kvmerger:sigma=3@0.35']", "shard=1 num_shards=2"),
    *("dry_run=true", "output_dir=/tmp/results", "model.context=512", "model.dtype=bfloat16"),
)
STRANGE = (
    *("", "null", "true", "yep", "0", "-1", "-3", "1.5", "2.0", "1e999", "nan", "inf", "0x10"),
    *("9" * 30, "x" * 300, "abc", "'abc'", '"abc"', "a b", "a,b", "a=b", "=", "'", '"', "\\", "#"),
    *("(", ")", "[", "{", "]", "}", "[]", "[1]", "[a,b]", "[[1]]", "{}", "{a:1}", "[1,", "{a:", "~"),
    *("{_target_:os.system}", "~nobody/x", "${nope}", "${seed}", "${a.b.c}", "${oc.env:NOPE}"),
    *(
        "${oc.env:HOME}",
        "${",
        "${seed",
        "$HOME",
        "???",
        "é",
        "日本",
        "\N{PILE OF POO}",
        "\udcff",
        "\x00",
    ),
    *("\n", "\t", "../x", "/", ".", "a/b", "choice(1,2)", "range(3)", "glob(*)", "int(3)", "str(3)"),
    *("sort(1)", "tag(a)", "@", "!", "%", "*"),
)
PREFIXES = ("", "", "", "", "+", "++", "~", "-", "--", "+++", " ")
OF_HYDRA = (
    *(
        "hydra",
        "hydra.run.dir",
        "hydra.job.chdir",
        "hydra.output_subdir",
        "hydra.mode",
        "hydra.verbose",
    ),
    *("hydra.sweep.dir", "hydra/launcher", "hydra/job_logging", "hydra.job.name", "hydra.searchpath"),
)


def keys() -> list[str]:
    """Every setting of the command line, and those inside every choice of its groups."""
    found = list(yaml.safe_load((config_dir() / "config.yaml").read_text()))
    for group in GROUPS:
        found.append(group)
        for name in choices(group):
            inside = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text())
            found += [f"{group}.{key}" for key in inside if group != "experiment"]
    return sorted(set(found) - {"defaults"})


KEYS = keys()


def misspelt(text: str, rng: random.Random) -> str:
    """A text with a letter more, less, or another."""
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(["", "x", "_", ".", "é", " "]) + text[at + rng.randrange(2) :]


def strange_word(rng: random.Random) -> str:
    """One argument that nobody should give, or that somebody might."""
    kind = rng.random()
    if kind < 0.08:
        return rng.choice(STRANGE)
    if kind < 0.16:
        return f"{rng.choice(OF_HYDRA)}={rng.choice(STRANGE)}"
    key = rng.choice(KEYS)
    if kind < 0.26:
        key = misspelt(key, rng)
    prefix, value = rng.choice(PREFIXES), rng.choice(STRANGE)
    if prefix == "~" and rng.random() < 0.5:
        return f"~{key}"
    if kind > 0.9 and key in GROUPS:
        value = misspelt(rng.choice(GROUPS[key]), rng)
    return f"{prefix}{key}={value}"


def line(rng: random.Random) -> list[str]:
    """Some arguments that are right, and one or two that are strange, in any order."""
    words = [f"{group}={rng.choice(names)}" for group, names in GROUPS.items() if rng.random() < 0.3]
    words += [part for word in rng.sample(GOOD, rng.randrange(3)) for part in word.split()]
    words += [strange_word(rng) for _ in range(rng.choice([1, 1, 2]))]
    rng.shuffle(words)
    return words


def attempt(rng: random.Random) -> None:
    """Compose a line: what is wrong is one message of some words, not a page, that names something."""
    words = line(rng)
    try:
        settings = compose(words)
    except UserError as error:
        message = str(error)
        assert 8 < len(message) < 2_000, (words, message)
        assert "Traceback" not in message, (words, message)
    except Exception as error:
        raise type(error)(f"{words}: {error}") from error
    else:
        assert isinstance(settings, Settings)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_line_is_the_settings_of_a_run_or_one_message(chunk: int) -> None:
    def of_chunk(rng: random.Random) -> None:
        attempt(random.Random(f"{chunk}/{rng.random()}"))

    assert not yields(TRIALS // CHUNKS, of_chunk)


AS_GIVEN = [
    value
    for value in STRANGE
    if not set("\x00\udcff") & set(value) and "${" not in value and not value.startswith("~nobody")
]
"""What a path may hold: all but what no file name does, interpolations, and homes that do not exist."""


@pytest.mark.parametrize("value", AS_GIVEN)
def test_a_path_is_what_the_shell_hands_over(value: str, tmp_path: Path) -> None:
    """Unquoted, whatever it holds."""
    path = f"{tmp_path}/{value}"
    assert str(compose([f"output_dir={path}"]).output_dir) == str(Path(path))
    if len(value) < 200:  # a model's folder names the model
        assert compose(["model=tiny-random", f"model.path={path}"]).model.path == path


def test_a_path_may_be_quoted_for_hydra_all_the_same(tmp_path: Path) -> None:
    for quote in "'\"":
        assert compose([f"output_dir={quote}{tmp_path}/a=b{quote}"]).output_dir == tmp_path / "a=b"
    assert compose(["output_dir=null"]).resolved["output_dir"] is None


# --- what only a whole command shows


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """End a test that waits for something which never comes."""

    def give_up(*_: object) -> None:
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def assert_told(done: Output) -> None:
    assert "Traceback" not in done.err
    assert done.status == 2, done.err


@pytest.fixture
def strange_places(tmp_path: Path) -> dict[str, Path]:
    """A pipe, a file, a link that leads nowhere, and a name that is too long."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at" / "all")
    return {
        "pipe": tmp_path / "pipe.jsonl",
        "file": tmp_path / "file",
        "link": tmp_path / "link",
        "long": tmp_path / ("x" * 300),
        "proc": Path("/proc/results"),
    }


@pytest.mark.parametrize("place", ["file", "link", "long", "proc"])
def test_an_output_dir_that_cannot_be_one_is_told(
    command: Callable[..., Output], place: str, strange_places: dict[str, Path]
) -> None:
    words = ["model=tiny-random", "benchmark=mini", "benchmark.tasks=[passkey]", "limit=1"]
    done = command(*words, f"output_dir={strange_places[place]}")
    assert_told(done)
    assert "error: " in done.err
    assert str(strange_places[place])[:40] in done.err


@pytest.mark.parametrize("setting", ["benchmark.dataset", "benchmark.data_dir", "model.path"])
def test_a_pipe_for_data_or_a_model_is_told_and_not_waited_for(
    command: Callable[..., Output], setting: str, strange_places: dict[str, Path]
) -> None:
    words = ["model=tiny-random", "budget=0.5"]
    if setting == "benchmark.dataset":
        words += ["benchmark=custom", "benchmark.template='{text}'", "benchmark.metric=qa_f1"]
    elif setting == "benchmark.data_dir":
        words += ["benchmark=longbench", "benchmark.tasks=[qasper]"]
    done = command(*words, f"{setting}={strange_places['pipe']}")
    assert_told(done)
    assert "error: " in done.err


@pytest.mark.parametrize(
    "word", ["hydra/launcher=nope", "hydra=x", "hydra.job.chdir=true", "--cfg", "-x"]
)
def test_strange_words_for_hydra_are_told(command: Callable[..., Output], word: str) -> None:
    assert_told(command(word))
