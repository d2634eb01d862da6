"""The page in a browser: accessible, offline, on a phone, on paper, unmoved by hostile texts."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright
from pypdf import PdfReader

from harness.prompts import Prompt, prompt_path
from harness.report.page import samples as samples_module
from harness.report.page import write_report
from harness.report.run import load_run
from tests.synthetic_run import record, write_run

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"
)
WIDE, PHONE = 1280, 375
METHODS = ("kvmerger", "kvmerger:sigma=mean_distance", "h2o", "cam", "snapkv", "tova")
CELLS = ("full@1", *(f"{method}@{budget}" for budget in ("0.5", "0.35") for method in METHODS))
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
HOSTILE = f"{EVIL}<!-- {{{{ 7*7 }}}} ]]> & &amp; \u202etfel\u202c \x00 \u2028 'x\" $x^2$ "
TASK = "<img src=x onerror='window.hacked=1'>{{7*7}}#?%41"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # As root, which CI is, Chromium has no sandbox of its own.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def a_run(folder: Path, cells: tuple[str, ...] = CELLS, tasks: int = 9, samples: int = 12) -> Path:
    """A run whose first method loses every third sample; prompts of its first task are recorded."""
    names = [f"task_{number}" for number in range(tasks)]
    by_cell = {}
    for place, cell in enumerate(cells):
        budget = float(cell.rpartition("@")[2])
        lines = [
            record(
                f"sample {i}",
                0.0 if place == 1 and i % 3 == 0 else 1.0 - 0.01 * ((place + i) % 7),
                prediction=f"answer {i} of {cell}",
                budget_achieved=budget,
                kl_to_full=None if place == 0 else 0.1 * place + 0.01 * i,
            )
            for i in range(samples)
        ]
        by_cell[cell] = dict.fromkeys(names, lines)
    write_run(folder, dict.fromkeys(names, "qa_f1"), by_cell)
    path = prompt_path(folder, names[0])
    path.parent.mkdir()
    path.write_text(
        "".join(
            Prompt(
                id=f"sample {i}", prompt_hash="cafe", prompt_tokens=100, head=f"Head {i}", tail="Tail"
            ).to_json()
            + "\n"
            for i in range(samples)
        )
    )
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([load_run(a_run(tmp_path_factory.mktemp("run")))])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a run may say says what no page should obey; one answer has a million letters."""
    folder = tmp_path_factory.mktemp("hostile")
    lines = [
        record(
            f"{i}{HOSTILE}", 1.0 - i / 4, prediction=text, answers=(HOSTILE, ""), budget_achieved=0.5
        )
        for i, text in enumerate((HOSTILE, "x" * 1_000_000, "", "\x00\x1b[31m"))
    ]
    write_run(
        folder,
        {TASK: "qa_f1"},
        {"full@1": {TASK: lines}, "h2o@0.5": {TASK: lines[::-1]}},
        model=f"m{EVIL}",
        dtype=HOSTILE.replace("\x00", ""),
    )
    path = prompt_path(folder, TASK)
    path.parent.mkdir()
    path.write_text(
        Prompt(
            id=f"0{HOSTILE}", prompt_hash="cafe", prompt_tokens=9, head=HOSTILE, tail=HOSTILE
        ).to_json()
        + "\n"
    )
    return write_report([load_run(folder)])


@contextmanager
def opened(
    browser: Browser,
    path: Path,
    width: int = WIDE,
    hash_: str = "",
    missing: bool = False,
    **options: Any,
) -> Iterator[Page]:
    """A page, opened from the disk; it may neither complain nor ask anybody for anything.

    `missing`: but for a file beside it that is not there.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri() + hash_)
    yield page
    page.wait_for_timeout(100)
    assert [one for one in complaints if not (missing and "ERR_FILE_NOT_FOUND" in one)] == []
    folder = path.parent.as_uri()
    assert [url for url in asked if not url.startswith(("data:", "blob:", folder))] == []
    context.close()


def reveal(page: Page) -> None:
    """Open all that is closed and let every table and the samples come into view."""
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    for element in page.query_selector_all("table.sorted, .browser"):
        if element.is_visible():
            element.scroll_into_view_if_needed()
    page.wait_for_function(
        "() => [...document.querySelectorAll('table.sorted')].every((one) => one.dataset.live)"
    )


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_no_serious_finding_of_axe_and_no_sideways_scroll(
    browser: Browser, report: Path, width: int
) -> None:
    with opened(browser, report, width) as page:
        reveal(page)
        page.wait_for_selector(".cards .card")
        found = Axe().run(page).response
        serious = [
            (one["id"], one["impact"], [node["html"][:120] for node in one["nodes"][:3]])
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert len(found["passes"]) > 20
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_table_sorts_and_searches(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        reveal(page)
        table = page.locator("table.sorted").filter(
            has=page.locator("caption", has_text="Scores by task")
        )
        rows = table.locator("tbody tr:visible")
        assert rows.first.locator("th").inner_text() == "average"
        assert rows.count() == 10
        header = table.locator("thead th").first
        for order in ("ascending", "descending"):
            header.click()
            expect(header).to_have_attribute("aria-sort", order)
        expect(rows.first.locator("th")).to_have_text("task_8")
        exhibit = page.locator(".exhibit").filter(has=page.locator("h4", has_text="Scores by task"))
        exhibit.locator("input[type=search]").fill("task_3")
        expect(rows).to_have_count(1)
        expect(rows.first.locator("th")).to_have_text("task_3")


def test_numbers_sort_as_numbers(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        reveal(page)
        table = page.locator("table.sorted").filter(
            has=page.locator("caption", has_text="Contrasts by task")
        )
        header = table.locator("thead th", has_text="A - B")
        header.click()
        expect(header).to_have_attribute("aria-sort", "ascending")
        shown = table.locator("tbody td[data-order]:nth-child(5)")
        values = [
            float(one) for one in shown.evaluate_all("all => all.map((one) => one.dataset.order)")
        ]
        assert len(values) > 100
        assert values == sorted(values)
        assert min(values) < -10 < 0 < max(values)


def test_task_names_and_headings_stay_in_sight(browser: Browser, report: Path) -> None:
    with opened(browser, report, PHONE) as page:
        box = page.locator(".scroll").filter(has=page.locator("caption", has_text="Scores by task"))
        box.scroll_into_view_if_needed()
        box.evaluate("box => box.scrollTo(400, 60)")
        left = box.evaluate("box => box.getBoundingClientRect().left")
        name = box.locator("tbody th").nth(3)
        assert abs(name.evaluate("one => one.getBoundingClientRect().left") - left) < 3
        assert box.evaluate(
            "box => box.querySelector('thead th').getBoundingClientRect().top >= "
            "box.getBoundingClientRect().top"
        )


def test_the_page_reads_without_its_script(browser: Browser, report: Path) -> None:
    with opened(browser, report, java_script_enabled=False) as page:
        text = page.inner_text("main")
        assert "Does KVMerger keep up with the full cache?" in text
        assert "task_8" in text
        assert page.locator(".controls").is_hidden()
        assert "To browse samples the page needs its script" in text


def test_on_paper_every_column_is_there(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        printed = PdfReader(io.BytesIO(page.pdf(prefer_css_page_size=True)))
    width = float(printed.pages[0].mediabox.width)
    assert 590 < width < 600  # A4
    text = "".join(sheet.extract_text() for sheet in printed.pages)
    squeezed = "".join(text.split())
    for cell in CELLS:
        assert squeezed.count(cell) >= 4, cell  # scores, differences, contrasts, budgets
    beyond = [
        (number, what)
        for number, sheet in enumerate(printed.pages)
        for what, x in placed(sheet)
        if what.strip() and not 0 <= x < width - 20
    ]
    assert beyond == []
    assert len(printed.pages) < 20


def placed(sheet: Any) -> list[tuple[str, float]]:
    """Texts of a printed page, each with where it begins."""
    found: list[tuple[str, float]] = []

    def visit(text: str, matrix: Any, text_matrix: Any, *_: Any) -> None:
        found.append((text, matrix[0] * text_matrix[4] + matrix[2] * text_matrix[5] + matrix[4]))

    sheet.extract_text(visitor_text=visit)
    return found


def test_one_sample_at_a_time_with_every_cell_s_answer(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        page.locator(".browser").scroll_into_view_if_needed()
        page.wait_for_selector(".card")
        assert page.locator(".card").count() == len(CELLS)
        assert page.locator("[role=status]").inner_text() == "task_0: sample 1 of 12, sample 0"
        assert page.locator(".prompt pre").all_inner_texts() == ["Head 0", "Tail"]
        assert "a" in page.locator(".gold").inner_text()
        card = page.locator(".card", has=page.locator("h5", has_text="kvmerger@0.5"))
        assert card.locator(".tag").inner_text() == "lost"
        assert "score 0.0 · KL 0.1000 · 3 tokens" in card.inner_text()
        assert "answer 0 of kvmerger@0.5" in card.inner_text()
        assert page.get_by_role("button", name="Previous").is_disabled()
        page.get_by_role("button", name="Next").focus()
        page.keyboard.press("Enter")
        assert page.locator("[role=status]").inner_text() == "task_0: sample 2 of 12, sample 1"
        assert page.url.endswith("/task_0/sample%201")


def test_samples_are_filtered_by_task_cell_and_flips(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        page.locator(".browser").scroll_into_view_if_needed()
        page.wait_for_selector(".card")
        status = page.locator("[role=status]")
        page.get_by_role("combobox", name="Flips").select_option("flips only")
        assert status.inner_text() == "task_0: sample 1 of 4, sample 0"
        page.get_by_role("combobox", name="Task").select_option("task_2 (12)")
        page.get_by_role("combobox", name="Cell").select_option("kvmerger@0.5")
        assert status.inner_text() == "task_2: sample 1 of 4, sample 0"
        assert page.locator(".card").count() == 2  # beside the full cache
        assert "was not recorded" in page.locator("[data-is=view]").inner_text()
        page.get_by_role("combobox", name="Cell").select_option("h2o@0.5")
        assert status.inner_text() == "No sample of task_2 is so."


def test_a_link_leads_to_its_sample(browser: Browser, report: Path) -> None:
    with opened(browser, report, hash_="#sample/toy-toy-1m/task_4/sample%207") as page:
        page.wait_for_selector(".card")
        assert page.locator("[role=status]").inner_text() == "task_4: sample 8 of 12, sample 7"
        assert page.locator(".controls").is_visible()


def test_samples_that_are_too_many_lie_beside_the_page(
    browser: Browser, tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "INLINE", 1_000)
    path = write_report([load_run(a_run(tmp_path, CELLS[:3], tasks=2))])
    beside = sorted((tmp_path / "report_samples").rglob("*.js"))
    assert [one.name for one in beside] == ["task_0.js", "task_1.js"]
    assert "answer 3 of full@1" not in path.read_text()
    with opened(browser, path, hash_="#sample/toy-toy-1m/task_1/sample%203", missing=True) as page:
        page.wait_for_selector(".card")
        assert "answer 3 of full@1" in page.locator(".cards").inner_text()
        assert "they lie beside it" in page.locator(".browser").inner_text()
        beside[0].unlink()
        page.get_by_role("combobox", name="Task").select_option("task_0 (12)")
        page.wait_for_function(
            "() => document.querySelector('[role=status]').textContent.includes('keep')"
        )
        said = page.locator("[role=status]").inner_text()
        assert said.endswith("/task_0.js is not beside this page: keep its folder with the page.")


def test_a_picture_is_in_the_page_once_and_can_be_enlarged(browser: Browser, report: Path) -> None:
    text = report.read_text()
    assert text.count("data:image/png;base64,") == text.count('class="enlarge"') > 1
    with opened(browser, report) as page:
        button = page.locator("button.enlarge").first
        assert len(button.locator("img").get_attribute("alt") or "") > 40
        button.focus()
        page.keyboard.press("Enter")
        shown = page.locator("dialog img")
        assert shown.is_visible()
        assert shown.evaluate("one => one.naturalWidth") > 500
        page.keyboard.press("Escape")
        assert shown.is_hidden()


@pytest.mark.parametrize("inline", [3_000_000, 0])
def test_hostile_texts_are_shown_and_obeyed_nowhere(
    browser: Browser, hostile: Path, inline: int, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    monkeypatch.setattr(samples_module, "INLINE", inline)
    path = write_report([load_run(hostile.parent)])
    with opened(browser, path) as page:
        reveal(page)
        page.wait_for_selector(".card")
        shown = HOSTILE.replace("\x00", "\u2400")
        texts = page.locator(".prompt pre").evaluate_all("all => all.map((one) => one.textContent)")
        assert texts == [shown, shown]
        gold = page.locator(".gold li").evaluate_all("all => all.map((one) => one.textContent)")
        assert gold == [shown, ""]
        assert page.locator(".answer").first.evaluate("one => one.textContent") == shown
        for _ in range(3):
            page.get_by_role("button", name="Next").click()
        assert "\u2400\u241b[31m" in page.locator(".cards").inner_text()
        assert TASK in page.inner_text("main")
        assert page.title() == f"KV-cache compression: m{EVIL} on toy"
        assert page.evaluate("window.hacked") is None
        assert "49" not in page.locator("h1").inner_text()
        assert page.locator("img[src=x]").count() == 0
    assert path.stat().st_size < 2_000_000
