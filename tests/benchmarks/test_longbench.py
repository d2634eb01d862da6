import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from benchmarks import longbench
from benchmarks.longbench import prompt
from benchmarks.longbench.benchmark import ARCHIVE, FILES, ROWS, LongBench
from benchmarks.longbench.tasks import TASKS, find_task, template
from benchmarks.task import PromptFormat
from kvmerge.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/longbench"
NAMES = [task.name for task in TASKS]


def row(dataset="qasper", **changes):
    fields = {
        "input": "Which {set}?",
        "context": "A {text} of ours.\r\n",
        "answers": ["this one"],
        "length": 9,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": "0",
    }
    return fields | changes


def write(folder, dataset, *rows):
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    path = folder / f"{dataset}.jsonl"
    path.write_bytes(text.encode())
    return path


def official_json(values):
    return hashlib.sha256(json.dumps(values, indent=4, ensure_ascii=False).encode()).hexdigest()


# Constants of the protocol


def test_templates_are_the_official_file():
    assert official_json({name: template(name) for name in NAMES}) == (
        "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30"
    )


def test_answer_lengths_are_the_official_file():
    assert official_json({task.name: task.max_new_tokens for task in TASKS}) == (
        "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022"
    )


def test_each_task_has_a_template_file_and_each_file_a_task():
    folder = Path(longbench.__file__).parent / "prompts"
    assert sorted(path.stem for path in folder.iterdir()) == sorted(NAMES)


def test_each_task_has_its_official_metric_wrap_and_ending():
    assert {t.name for t in TASKS if t.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    plain = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {t.name for t in TASKS if not t.chat} == plain
    assert [t.name for t in TASKS if t.stop_at_newline] == ["samsum"]
    by_metric = {}
    for task in TASKS:
        by_metric.setdefault(task.metric.name, set()).add(task.name)
    assert by_metric == {
        "qa_f1": {
            *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa"),
            *("2wikimqa", "musique", "triviaqa"),
        },
        "qa_f1_zh": {"multifieldqa_zh"},
        "rouge_l": {"gov_report", "qmsum", "multi_news", "samsum"},
        "rouge_zh": {"dureader", "vcsum"},
        "classification": {"trec", "lsht"},
        "count": {"passage_count"},
        "retrieval": {"passage_retrieval_en"},
        "retrieval_zh": {"passage_retrieval_zh"},
        "code_sim": {"lcc", "repobench-p"},
    }


# Prompts


def test_prompt_leaves_braces_of_the_text_alone():
    assert prompt(row("trec")).endswith("\n\nA {text} of ours.\r\n\nWhich {set}?")
    assert prompt(row("lcc")) == (
        "Please complete the code given below. \nA {text} of ours.\r\nNext line of code:\n"
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n != "qasper"])
def test_prompts_equal_the_published_ones(name):
    """`_id` of these rows begins the SHA-1 of the prompt that MiniLongBench published."""
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    # MiniLongBench corrected a typing error, and added a newline at the end of multi_news.
    changed = {
        "narrativeqa": lambda text: text.replace("asconcisely", "as concisely"),
        "multi_news": lambda text: f"{text}\n",
    }.get(name, str)
    samples = LongBench(str(SHARED), [name]).samples(find_task(name))
    published = [s for s in samples if len(s.id) == 24]  # the others carry official ids
    assert published
    for sample in published:
        assert hashlib.sha1(changed(sample.prompt).encode()).hexdigest()[:24] == sample.id


def test_gold_answers_of_real_rows_score_full_marks():
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is absent")
    benchmark = LongBench(str(SHARED))
    total = 0
    for task in benchmark.tasks:
        for sample in benchmark.samples(task):
            total += 1
            best = max(benchmark.score(sample, task, answer)["score"] for answer in sample.answers)
            # The official metrics give less than 1 to some golds: code with // or #, and class
            # names that hold others.
            if task.metric.name not in ("code_sim", "classification"):
                assert best > 0.99, (task.name, sample.id)
    assert total == 264


# Rows


def test_a_folders_rows_become_samples_that_can_be_scored(tmp_path):
    path = write(
        tmp_path,
        "trec",
        row("trec", answers=["umb"]),
        row("trec", _id="1", all_classes=["a", "umb"]),
    )
    benchmark = LongBench(str(tmp_path), ["trec"])
    first, second = benchmark.samples(benchmark.tasks[0])
    assert (first.id, first.task, first.answers) == ("0", "trec", ("umb",))
    assert first.prompt == prompt(row("trec"))
    assert first.all_classes == second.all_classes == ("a", "umb")  # those of the last row
    assert benchmark.score(first, benchmark.tasks[0], "\numb\na")["score"] == 1
    assert benchmark.fingerprint() == {"trec": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("name", ["0" * 48, "f" * 24])
@pytest.mark.parametrize(
    "fields",
    [
        {"context": "a\r\nb\r\u2028\ufffd\x85"},
        {"context": "长" * 200_000},
        {"input": "", "context": "", "answers": [""]},
        {"all_classes": None},
        {"all_classes": []},
        {"extra": {"nested": [1, None]}},
    ],
    ids=["line ends", "long", "empty", "no classes", "empty classes", "further fields"],
)
def test_any_row_of_the_official_layout_is_taken(tmp_path, name, fields):
    given = row(**fields, _id=name)
    write(tmp_path, "qasper", given)
    (sample,) = LongBench(str(tmp_path), ["qasper"]).samples(find_task("qasper"))
    assert (sample.id, sample.row, sample.prompt) == (name, given, prompt(given))


@pytest.mark.parametrize(
    ("task", "bad", "words"),
    [
        ("qasper", row("hotpotqa", _id="1"), "dataset is 'hotpotqa', expected 'qasper'"),
        ("qasper", row(), "_id '0' is already that of line 1"),
        ("passage_retrieval_en", row("passage_retrieval_en", _id="1"), "metric retrieval cannot"),
        ("trec", row("trec", _id="1"), "metric classification cannot score.* all_classes None"),
    ],
)
def test_bad_rows_are_named(tmp_path, task, bad, words):
    write(tmp_path, task, row(task, answers=["Paragraph 1"] if task != "trec" else []), bad)
    with pytest.raises(UserError, match=rf"{task}\.jsonl, line 2: {words}"):
        LongBench(str(tmp_path), [task]).samples(find_task(task))


def test_only_the_tasks_that_ask_for_it_are_wrapped(tmp_path):
    class Characters:
        def __call__(self, text, **_):
            return {"input_ids": [*map(ord, text)]}

    write(tmp_path, "qasper", row())
    write(tmp_path, "lcc", row("lcc"))
    benchmark = LongBench(str(tmp_path), ["lcc", "qasper"])
    assert [t.name for t in benchmark.tasks] == ["qasper", "lcc"]  # official order
    fmt = PromptFormat(max_length=10_000, chat="<{prompt}>")
    texts = []
    for task in benchmark.tasks:
        (sample,) = benchmark.samples(task)
        texts.append("".join(map(chr, benchmark.encode(sample, task, Characters(), fmt).prompt)))
    assert texts == [f"<{prompt(row())}>", prompt(row("lcc"))]


# What users get wrong


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["qaspr"], "unknown LongBench task 'qaspr'. Did you mean 'qasper'"),
        ("qaspr", "unknown LongBench task 'qaspr'"),
        ([2], "unknown LongBench task '2'"),
        ([], "benchmark.tasks is empty"),
    ],
)
def test_a_task_that_does_not_exist_is_refused(tasks, words):
    with pytest.raises(UserError, match=words):
        LongBench(None, tasks)


def test_an_unknown_task_has_no_prompt_and_no_score():
    with pytest.raises(UserError, match="unknown LongBench task 'nope'"):
        longbench.score("nope", "a", ["a"])
    with pytest.raises(UserError, match="unknown LongBench task 'nope'"):
        prompt(row("nope"))


def test_missing_folder_and_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data_dir .*nowhere is not a folder"):
        LongBench(str(tmp_path / "nowhere"))
    write(tmp_path, "qasper", row())
    with pytest.raises(UserError, match=r"has no trec\.jsonl\..*benchmark\.tasks=\[qasper\]"):
        LongBench(str(tmp_path), ["trec"])


# The official archive


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose archive holds qasper.jsonl in some folder, next to its LongBench-E file."""
    path = write(tmp_path, "qasper", row())
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper_e.jsonl", "not this one")
        archive.write(path, "data/qasper.jsonl")
    files = []

    def fetch(file):
        files.append(file)
        return tmp_path / "data.zip"

    monkeypatch.setattr("benchmarks.source.fetch", fetch)
    return files


def test_an_archive_is_read_like_a_folder(hub, tmp_path):
    remote = LongBench(tasks=["qasper"])
    assert hub == []  # nothing is fetched before it is needed
    task = find_task("qasper")
    local = LongBench(str(tmp_path), ["qasper"])
    assert remote.samples(task) == local.samples(task)
    assert remote.fingerprint() == local.fingerprint()
    assert set(hub) == set(FILES)


def test_an_archive_without_the_task_is_refused(hub):
    with pytest.raises(UserError, match=r"data\.zip holds no trec\.jsonl"):
        LongBench(tasks=["trec"]).samples(find_task("trec"))


def test_the_default_archive_is_pinned():
    assert (ARCHIVE.repo, ARCHIVE.filename, ARCHIVE.size) == (
        "THUDM/LongBench",
        "data.zip",
        113_932_529,
    )
    assert len(ARCHIVE.revision) == 40
    assert len(ARCHIVE.sha256) == 64


def test_another_revision_is_not_checked_and_noted(hub):
    benchmark = LongBench(tasks=["qasper"], revision="main")
    benchmark.samples(find_task("qasper"))
    assert [(file.repo, file.revision, file.sha256) for file in hub] == [
        ("THUDM/LongBench", "main", None)
    ]
    (note,) = benchmark.notes()
    assert "revision main of THUDM/LongBench" in note
    assert LongBench(tasks=["qasper"]).notes() == []
    assert LongBench(tasks=["qasper"], revision=ARCHIVE.revision).notes() == []


def test_a_revision_of_a_folder_is_refused(tmp_path):
    write(tmp_path, "qasper", row())
    with pytest.raises(UserError, match=r"benchmark\.revision=main is of the hub"):
        LongBench(str(tmp_path), ["qasper"], revision="main")


def test_the_official_rows_are_4750():
    assert list(ROWS) == NAMES
    assert sum(ROWS.values()) == 4750
