from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baselines.random import Random
from harness.judgement import FlipRule, Judgement
from harness.provenance import fingerprint
from harness.settings import Settings
from kvmerge.errors import UserError
from kvmerge.session import Policy
from tests.tiny_run import compose, row, write_rows

TREC = ("benchmark=longbench", "benchmark.tasks=[trec]")


def names(settings: Settings) -> list[str]:
    return [cell.name for cell in settings.cells]


def test_without_a_choice_the_default_method_runs_at_half_the_cache() -> None:
    settings = compose(*TREC)
    assert names(settings) == ["full@1", "kvmerger@0.5"]
    assert settings.model.name == "smollm2-135m"
    assert (settings.seed, settings.num_seeds, settings.limit) == (0, 3, None)
    assert (settings.shard, settings.num_shards) == (0, 1)
    assert settings.judgement == Judgement()
    given = compose(*TREC, "margin=0.5", "flips.well=80", "flips.drop=20")
    assert given.judgement == Judgement(0.5, FlipRule(80, 20))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["method=h2o", "budget=0.35"], "h2o@0.35"),
        (["method=h2o", "budget=1024"], "h2o@1024"),
        (["method=h2o", "budget=1.0"], "h2o@1"),
        (["budget=1"], "kvmerger@1"),
        (["method=full"], "full@1"),
        (["method=full", "budget=1"], "full@1"),
        (["method.sigma=3", "method.pivot=first"], "kvmerger:pivot=first,sigma=3@0.5"),
        (["method.sigma=1e-5"], "kvmerger:sigma=1e-05@0.5"),
        (["method=h2o", "method.recent=8", "budget=64"], "h2o:recent=8@64"),
    ],
)
def test_method_and_budget_make_one_cell_beside_the_full_cache(given: list[str], name: str) -> None:
    assert names(compose(*TREC, *given)) == list(dict.fromkeys(["full@1", name]))
    assert names(compose(*TREC, *given, "baseline=none")) == [name]


def test_cells_are_what_runs() -> None:
    listed = "cells=[full@1,h2o@0.5,'kvmerger:sigma=3@64']"
    assert names(compose(*TREC, listed)) == ["full@1", "h2o@0.5", "kvmerger:sigma=3@64"]


def test_an_experiment_fills_cells_and_tasks_and_both_can_be_changed() -> None:
    settings = compose("experiment=paper_longbench")
    assert names(settings)[0] == "full@1"
    assert {task.name for task in settings.benchmark.tasks} >= {"trec", "qasper"}
    changed = compose("experiment=paper_longbench", "benchmark.tasks=[trec]", "cells=[h2o@0.5]")
    assert [task.name for task in changed.benchmark.tasks] == ["trec"]
    assert names(changed) == ["h2o@0.5"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["method=h2o"], "so method cannot be given"),
        (["budget=0.5"], "so budget cannot be given"),
        (["baseline=none"], "so baseline cannot be given"),
        (["method=h2o", "budget=0.5"], "so budget and method cannot be given"),
        (["method.sigma=3"], "so method.sigma cannot be given"),
    ],
)
@pytest.mark.parametrize(
    ("chosen", "named"),
    [("experiment=paper_longbench", "experiment=paper_longbench"), ("cells=[full@1]", "cells=")],
)
def test_method_or_budget_beside_cells_would_be_ignored_and_is_refused(
    given: list[str], why: str, chosen: str, named: str
) -> None:
    with pytest.raises(UserError, match=why) as caught:
        compose(*TREC, chosen, *given)
    assert str(caught.value).startswith(named)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("cells=full@1", "cells='full@1' must be a list"),
        ("cells=[]", "lists nothing"),
        ("cells=[0.5]", "cannot read the cell 0.5"),
        ("cells=[full@1,full@1]", "full@1 is listed twice"),
        ("budget=0", "budget=0 is out of range"),
        ("budget=-3", "budget=-3 is out of range"),
        ("budget=1.5", "budget=1.5 is out of range"),
        ("budget=nan", "budget=nan is out of range"),
        ("budget=inf", "budget=inf is out of range"),
        ("budget=abc", "budget='abc' is not a number"),
        ("budget=null", "budget=None is not a number"),
        ("budget=true", "budget=True is not a number"),
        ("method=full budget=0.5", "full@0.5: the full cache keeps everything"),
        ("budget=[0.5]", r"budget=\[0.5\] is not a number"),
        ("baseline=h2o", "baseline='h2o' must be full or none"),
        ("limit=0", "limit=0 must be a whole number of 1 or more"),
        ("limit=-1", "limit=-1 must be"),
        ("limit=1.5", "limit=1.5 must be a whole number"),
        ("limit=all", "limit='all' must be a whole number"),
        ("limit=true", "limit=True must be a whole number"),
        ("seed=-1", "seed=-1 must be a whole number of 0 or more"),
        ("seed=null", "seed=None must be"),
        ("num_seeds=0", "num_seeds=0 must be a whole number from 1 to 10000"),
        ("num_shards=0", "num_shards=0 must be"),
        ("margin=0", "margin=0 must be a number of points above 0"),
        ("margin=-1", "margin=-1 must be a number of points above 0"),
        ("margin=inf", "margin=inf must be"),
        ("margin=wide", "margin='wide' must be a number"),
        ("margin=null", "margin=None must be a number"),
        ("flips.well=0", "flips.well=0 must be above 0 and at most 100"),
        ("flips.drop=101", "flips.drop=101 must be above 0 and at most 100"),
        ("flips.well=good", "flips.well='good' must be a number"),
        ("flips=50", "flips=50 must be a mapping"),
        ("+flips.gain=50", "unknown setting of flips 'gain'"),
        ("experiment=selfcheck margin=2", "compares no two methods, so margin cannot be given"),
        ("experiment=selfcheck flips.drop=20", "so flips.drop cannot be given"),
        ("shard=1", "shard=1 must be below num_shards=1"),
        ("shard=-1", "shard=-1 must be"),
        ("fidelity=maybe", "fidelity='maybe' must be true, false or null"),
        ("fidelity=1", "fidelity=1 must be"),
        ("decode_policy=keep", "unknown decode_policy 'keep'.*append, hold"),
        ("pos=relative", "unknown pos 'relative'.*absolute, rolled"),
        ("skip_budget=more", "unknown skip_budget 'more'.*compensated, plain"),
        ("layers_skip=2", "layers_skip=2 must be a list, each entry a whole number"),
        ("layers_skip=[first]", r"layers_skip=\['first'\] must be a list"),
        ("method.sigma=null", "sigma=None must be a number or a text"),
        ("method.sigma=wide", "unknown sigma rule 'wide'"),
        ("+method.width=3", "unknown setting of kvmerger 'width'"),
        ("model.dtype=float8", "unknown dtype 'float8'"),
        ("model.max_length=0", "model.max_length=0 must be"),
        ("benchmark.tasks=[trek]", "unknown LongBench task 'trek'. Did you mean 'trec'"),
        ("benchmark.tasks=[]", "benchmark.tasks is empty"),
        ("+benchmark.n_shot=3", "unknown setting of benchmark 'n_shot'"),
        ("+model.sharding=true", "unknown setting of model 'sharding'"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(given: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        compose(*TREC, *given.split())


def test_holding_a_budget_needs_a_rule_of_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*TREC, "cells=[full@1,random@0.5,h2o@0.5]", "decode_policy=hold"]
    monkeypatch.setattr(Random, "holds", False)
    with pytest.raises(UserError, match=r"decode_policy=hold: random@0\.5 has no rule"):
        compose(*given)
    monkeypatch.setattr(Random, "holds", True)
    compose(*given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["cells=[h2o@0.5]"], False),
        (["cells=[h2o@0.5,full@1]"], True),
        (["cells=[h2o@0.5]", "fidelity=true"], True),
        (["cells=[h2o@0.5,full@1]", "fidelity=false"], False),
        (["method=full"], True),
        (["method=h2o"], True),
        (["method=h2o", "baseline=none"], False),
    ],
)
def test_fidelity_follows_the_full_cell_unless_it_is_given(given: list[str], expected: bool) -> None:
    assert compose(*TREC, *given).fidelity is expected


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (["experiment=paper_longbench"], "paper_longbench/longbench/smollm2-135m"),
        (
            ["experiment=paper_longbench", "model=llama2-7b-chat"],
            "paper_longbench/longbench/llama2-7b-chat",
        ),
        (["experiment=paper_longbench", "seed=1"], "paper_longbench/longbench/smollm2-135m"),
        (["experiment=paper_longbench", "cells=[h2o@0.5]"], "cells/longbench/smollm2-135m"),
        ([*TREC, "method=h2o", "budget=0.35"], "cells/longbench/smollm2-135m"),
        ([*TREC, "cells=[h2o@1024]"], "cells/longbench/smollm2-135m"),
        ([*TREC, "method.sigma=3", "baseline=none"], "cells/longbench/smollm2-135m"),
    ],
)
def test_the_output_dir_is_named_by_experiment_or_shared_by_cells(
    given: list[str], folder: str
) -> None:
    assert compose(*given).output_dir == Path("results/runs") / folder


def test_other_cells_than_the_experiments_get_another_output_dir() -> None:
    experiment = compose("experiment=paper_longbench").output_dir
    other = compose("experiment=paper_longbench", "cells=[h2o@0.5,full@1]").output_dir
    assert other != experiment
    again = compose(*TREC, "cells=[h2o@0.5,full@1]").output_dir
    assert again == other, "the same cells must resume, however they were chosen"


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (["seed=1"], "cells-seed=1/mini/tiny-random"),
        (["pos=rolled", "decode_policy=hold"], "cells-decode_policy=hold,pos=rolled/mini/tiny-random"),
        (["layers_skip=[0,-1]"], "cells-layers_skip=[0,-1]/mini/tiny-random"),
        (["num_shards=4", "shard=2"], "cells-num_shards=4/mini/tiny-random"),
        (["model.dtype=bfloat16"], "cells/mini/tiny-random-dtype=bfloat16"),
        (["model.template_options.day='1 May'"], "cells/mini/tiny-random-template_options.day=1-May"),
        (["benchmark=longbench", "benchmark.profile=kcf"], "cells/longbench-profile=kcf/tiny-random"),
        (
            ["benchmark=perplexity", "benchmark.source=/home/me/book.txt"],
            "cells/perplexity-source=home-me-book.txt/tiny-random",
        ),
        # what the defaults say too, and what the same folder can hold two of
        (["seed=0", "pos=absolute", "model.dtype=float32", "num_shards=1"], "cells/mini/tiny-random"),
        (
            ["limit=2", "num_seeds=1", "batch_size=4", "margin=2"],
            "cells/mini/tiny-random",
        ),
        (["benchmark.tasks=[passkey]"], "cells/mini/tiny-random"),
        (["model.name=mine"], "cells/mini/mine"),
    ],
)
def test_a_shared_output_dir_is_named_by_what_its_cells_must_have_in_common(
    given: list[str], folder: str
) -> None:
    given = [word.replace("model.template_options", "+model.template_options") for word in given]
    assert compose("model=tiny-random", "method=h2o", *given).output_dir == Path("results/runs", folder)


def test_settings_share_an_output_dir_just_where_their_records_may_be_mixed() -> None:
    def made(*words: str) -> tuple[Path, object]:
        settings = compose("model=tiny-random", "cells=[full@1]", *words)
        prints = fingerprint(settings, {})
        return settings.output_dir, [prints[key] for key in ("model", "benchmark", "seed", "policy")]

    folder, prints = made()
    for word in (
        *("seed=3", "decode_policy=hold", "pos=rolled", "layers_skip=[0]", "skip_budget=plain"),
        *("model.dtype=bfloat16", "model.max_length=99", "model.chat=none", "benchmark=mini_long"),
        *("limit=1", "num_seeds=2", "fidelity=false", "batch_size=2", "benchmark.tasks=[passkey]"),
    ):
        other_folder, other_prints = made(word)
        assert (other_folder != folder) is (other_prints != prints), word


def test_a_long_value_or_many_do_not_make_a_name_that_no_folder_can_have() -> None:
    text = "benchmark.source=/" + "a" * 90
    paths = [f"{text}{end}" for end in "xy"]
    folders = [compose("method=h2o", "benchmark=perplexity", path).output_dir for path in paths]
    assert folders[0] != folders[1]
    assert all(len(folder.parent.name) < 80 for folder in folders)
    many = [f"+model.template_options.{'k' * 60}{i}=1" for i in range(4)]
    assert len(compose("method=h2o", *many).output_dir.name) < 40


def test_output_dir_is_taken_as_given_and_shards_write_below_it(tmp_path: Path) -> None:
    given = [*TREC, f"output_dir={tmp_path}"]
    assert compose(*given).results_dir == tmp_path
    shard = compose(*given, "shard=1", "num_shards=4")
    assert shard.output_dir == tmp_path
    assert shard.results_dir == tmp_path / "shards" / "1-of-4"
    home = compose(*TREC, "output_dir='~/results'").output_dir
    assert home == Path.home() / "results"


@pytest.mark.parametrize(
    "name", ["a (1)", "b=c#d", "[e", "{f}", "it's", "g,h", "~i", "ü", "back\\", "'q'"]
)
def test_a_path_needs_no_quotes_for_hydra(name: str) -> None:
    folder = f"/tmp/{name}"
    assert compose(*TREC, f"output_dir={folder}").output_dir == Path(folder)


def test_only_methods_that_draw_run_once_a_seed() -> None:
    cells = "cells=[full@1,cam@0.5,'cam:sample=expected@0.5',random@0.5,'kvmerger:pivot=random@0.5']"
    settings = compose(*TREC, cells, "seed=7", "num_seeds=2")
    seeds = {cell.name: settings.seeds(cell) for cell in settings.cells}
    assert seeds == {
        "full@1": [7],
        "cam@0.5": [7, 8],
        "cam:sample=expected@0.5": [7],
        "random@0.5": [7, 8],
        "kvmerger:pivot=random@0.5": [7, 8],
    }


def test_switches_hold_for_the_run_and_rows_are_the_cells() -> None:
    switches = ["decode_policy=hold", "pos=rolled", "layers_skip=[0,-1]", "skip_budget=plain"]
    settings = compose(*TREC, "cells=[full@1,h2o@0.5]", *switches)
    assert settings.policy == Policy("hold", "rolled", (0, -1), "plain")
    for cell in settings.cells:
        row_ = settings.row(cell, seed=4)
        assert (row_.method, row_.budget, row_.seed) == (cell.method, cell.budget, 4)


def test_shards_divide_the_first_samples_without_overlap(tmp_path: Path) -> None:
    write_rows(tmp_path, {"trec": [row("trec", number) for number in range(7)]})
    settings = compose(*TREC, f"benchmark.data_dir={tmp_path}")
    (task,) = settings.benchmark.tasks
    for limit, num_shards in itertools.product((None, 1, 4, 5, 7, 100), (1, 2, 3)):
        parts = [
            replace(settings, limit=limit, shard=shard, num_shards=num_shards).samples(task)
            for shard in range(num_shards)
        ]
        taken = sorted(sample.id for part in parts for sample in part)
        assert taken == [f"trec-{number}" for number in range(min(limit or 7, 7))]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_resolved_configuration_is_plain_data() -> None:
    resolved = compose(*TREC, "limit=3").resolved
    assert resolved["benchmark"]["tasks"] == ["trec"]
    assert type(resolved["benchmark"]["tasks"]) is list
    assert (resolved["limit"], resolved["budget"]) == (3, 0.5)


def test_a_local_checkpoint_does_not_borrow_the_default_model_s_name(checkpoint: Path) -> None:
    def name(*overrides: str) -> str:
        return compose(*TREC, *overrides).model.name

    path = f"model.path={checkpoint}"
    assert name(path) == checkpoint.name
    assert name(path, "model.name=mine") == "mine"
    assert name(path, "model=llama2-7b-chat") == "llama2-7b-chat"


@pytest.mark.parametrize("device", ["foo", "cuda"])
def test_a_device_that_is_not_there_is_refused_before_loading(device: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=rf"model\.device.*{device}"):
        compose(*TREC, f"model.device={device}")


def test_another_checkpoint_has_the_context_that_is_given(tmp_path: Path) -> None:
    path = f"model.path={tmp_path}"
    assert compose(*TREC, path).model.context is None  # not the default model's
    assert compose(*TREC, path, "model.context=700").model.context == 700
    assert compose(*TREC, path, "model=llama2-7b-chat").model.context == 4096
