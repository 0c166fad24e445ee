"""The report in a real browser: drawn, filtered, compared, by pointer and keyboard, wide and narrow, light and dark."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, find_chromium
from runs_on_disk import write_run

from grpo_dist.report.page import write_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)></p>\x1b[31mred\x00\u202eevil\u2028"
TEXTS = (HOSTILE, "x" * 10**6, "the answer is 4", "the answer is five, really")

chromium = find_chromium()
pytestmark = pytest.mark.skipif(chromium is None, reason="no Chromium here (Debian, Ubuntu: apt-get install chromium)")
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 28)"
"""Backgrounds of the page."""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run whose completions are hostile, long, and different from step to step."""

    def text(step: int, group: int, sample: int) -> str:
        return TEXTS[sample] if sample < 2 else f"{TEXTS[sample]} at {step}"

    return write_report([write_run(tmp_path_factory.mktemp("single") / "hostile", num_groups=4, text=text)])


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two seeds of one config and a third run with another learning rate."""
    root = tmp_path_factory.mktemp("several")
    runs = [write_run(root / "grpo_seed0"), write_run(root / "grpo_seed1", seed=1),
            write_run(root / "short", num_steps=6, batch_size=8)]  # fmt: skip
    return write_report(runs, root / "comparison.html")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    assert chromium is not None
    page = Page(chromium)
    yield page
    page.close()


@pytest.fixture(autouse=True)
def no_complaints(page: Page) -> Iterator[None]:
    """Nothing in the console, nothing that the security policy had to refuse."""
    page.complaints.clear()
    yield
    page.js("1")
    assert page.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_everything_is_drawn_and_nothing_overflows(
    page: Page, single: Path, several: Path, width: int, dark: bool
) -> None:
    for path, lines in ((single, 1), (several, 2)):
        page.open(path, width, dark)
        assert page.js("document.documentElement.scrollWidth") <= width
        assert page.style("body", "backgroundColor") == (DARK if dark else LIGHT)
        boxes = page.js("""[...document.querySelectorAll("[data-metric]")].map((chart) => [chart.dataset.metric,
            ...[...chart.querySelectorAll(".line")].map((line) => line.getBBox().width)])""")
        drawn = {name: widths for name, *widths in boxes}
        assert len(drawn["reward/mean"]) == lines and min(drawn["reward/mean"]) > 100
        assert {"kl", "agreement", "time/step"} - drawn.keys() == {"time/step"}  # that one never changed
        cells = page.js("[...document.querySelectorAll('.heat')].map((map) => map.querySelectorAll('.cell').length)")
        assert len(cells) == 3 and min(cells) > 10
        assert len(page.texts(".rows tbody tr")) == 40


def test_hostile_completions_are_text(page: Page, single: Path) -> None:
    page.open(single, 1440)
    (shown,) = page.texts(".rows tbody")
    assert "<script>alert(1)</script><img src=x onerror=alert(2)></p>␛[31mred␀⟨U+202E⟩evil⟨U+2028⟩" in shown
    assert page.texts("img, .rows script") == []
    assert "show all 20,000 characters kept of 1,000,000" in shown
    page.js("document.querySelector('.rows td.text button').click()")
    expected = "x" * 20_000 + " … cut: the completion has 1,000,000"
    assert any(text.startswith(expected) for text in page.texts("td.text"))


def fill(page: Page, **values: str) -> str:
    """Fill fields of the filter as a user would, and return what it says of the matches."""
    for name, value in values.items():
        page.js(f"""(() => {{ const field = document.getElementById({name!r}); field.value = {value!r};
            field.dispatchEvent(new Event("input", {{ bubbles: true }})); }})()""")
    return page.texts("#count")[0]


def test_the_filter_counts_and_sorts_what_matches(page: Page, single: Path) -> None:
    page.open(single, 1440)
    assert fill(page).startswith("192 match, of all 192 completions of 12 steps")
    assert fill(page, first="3", last="4").startswith("32 match")
    assert fill(page, low="0.5").startswith("8 match")  # unscored ones have no reward that could be above
    assert fill(page, text="ANSWER").startswith("0 match")
    assert fill(page, text="", low="", last="12", order="highest reward first").startswith("160 match")
    rewards = page.texts("[data-label=reward]")
    assert len(rewards) == 40 and rewards == sorted(rewards, reverse=True)
    page.js("document.getElementById('more').click()")
    assert len(page.texts(".rows tbody tr")) == 80


def test_two_steps_of_one_prompt_are_compared(page: Page, single: Path) -> None:
    page.open(single, 390)
    fill(page, text="is 4 at 1", first="1", last="1")
    page.js("document.querySelector('.compare').click()")
    assert page.js("document.querySelector('dialog').open")
    assert page.js("""(() => { const select = document.querySelectorAll("dialog select")[1];
        select.value = [...select.options].findIndex((option) => option.text.startsWith("step 11, no. 3"));
        select.dispatchEvent(new Event("change")); return [...document.querySelectorAll("dialog del, dialog ins")]
        .map((mark) => mark.tagName + mark.textContent); })()""") == ["DEL1", "INS11"]
    assert page.texts(".sides")[0].count("the answer is 4 at ") == 2
    page.press("Escape")
    page.wait_for("document.querySelector('dialog') === null")


TRACE = {
    "text": ["6 ", "x 7", HOSTILE, "\nResult: ", "42", "42"], "by": "mmmxtm", "logprob": [-0.01, -2.0, -5.0, -0.5],
    "gap": [0.0, 1e-6, None, -0.3], "entropy": [3.0, 0.2, None, 0.0], "advantage": [0.75, -2.5, 0.0, 0.75],
}  # fmt: skip


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([write_run(tmp_path_factory.mktemp("traced") / "run", num_steps=3, trace=TRACE)])


@pytest.mark.parametrize("width", [390, 1440])
def test_tokens_show_who_wrote_them(page: Page, traced: Path, width: int) -> None:
    page.open(traced, width)
    assert page.js("document.documentElement.scrollWidth") <= width
    assert page.js("""(() => { const edge = document.getElementById("writers").getBoundingClientRect().right;
        return [...document.querySelectorAll("#writers span")].every((span) =>
            [...span.getClientRects()].every((part) => part.right <= edge)); })()"""), "the legend stays in its column"
    tokens = "[...document.querySelector('.rows tbody tr').querySelectorAll('td.text + td.text span')]"
    assert page.js(f"{tokens}.map((token) => token.className)") == [
        "by-m shade0", "by-m shade3", "by-m shade4 untrained", "by-x", "by-t", "by-m shade1"
    ]  # fmt: skip
    assert "conversation" not in page.texts("#completions")[0], "the tokens show it"
    assert page.texts(".rows tr td.text + td.text")[0].startswith("6 x 7<script>alert(1)</script>")
    titles = page.js(f"{tokens}.map((token) => token.title)")
    assert titles[1] == "by the model: log-probability −2 (14 %), advantage −2.5, entropy 0.2, gap to the trainer 1e−6"
    assert (
        titles[2] == "by the model: log-probability −5 (<1 %), advantage 0, no gradient, so not computed by the trainer"
    )
    assert titles[3:5] == ["by the chat template", "by a tool or an environment"]
    page.js("document.querySelector('.tokens').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.press(key)
    assert page.texts(".tokens + .note")[0] == titles[1] and page.texts(".tokens .chosen") == ["x 7"]
    page.js(f"{tokens}[4].click()")
    assert page.texts(".tokens + .note")[0] == titles[4] and page.texts(".tokens .chosen") == ["42"]
    fill(page, colour="gap to the trainer")
    shades = [
        name[len("by-m shade")] for name in page.js(f"{tokens}.map((token) => token.className)") if "by-m" in name
    ]
    assert shades == ["0", "0", "0", "4"]
    fill(page, colour="advantage")
    shades = [name.removeprefix("by-m shade") for name in page.js(f"{tokens}.map((token) => token.className)")]
    assert [name for name in shades if not name.startswith("by-")] == ["2", "4 minus", "0 untrained", "2"]
    assert page.style(".rows .minus", "backgroundColor") != page.style("#writers .shade4", "backgroundColor")
    fill(page, colour="log-probability")


def test_an_address_names_a_completion_or_follows_a_prompt(page: Page, traced: Path) -> None:
    page.open(traced, 1440)
    assert page.style("#alone", "display") == "none"
    page.js("document.querySelector('.actions a').click()")
    page.wait_for("!document.getElementById('alone').hidden")
    assert page.js("location.hash") == "#prompt=0.3.4"
    assert page.texts("[data-label=step]") == [str(step) for step in (1, 3) for _ in range(4)]
    assert set(page.texts("td.prompt")) == {"prompt 2"}
    page.js("location.hash = '#completion=0.2.5'")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 1")
    assert page.texts("[data-label=step]") == ["2"] and page.texts("[data-label=tokens]") == ["4"]
    page.js("location.hash = '#completion=0.77.5'")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 0")
    page.js("document.querySelector('#alone a').click()")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 24")


def test_by_keyboard(page: Page, single: Path) -> None:
    """Everything that can be used is reached with Tab, in order, and seen where it is."""
    page.open(single, 1440)
    reached = []
    while "text" not in reached and len(reached) < 40:
        page.press("Tab")
        reached.append(page.js("document.activeElement.id || document.activeElement.textContent"))
        assert page.js("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert reached[0] == "Skip to the completions"
    named = ["theme", "step", "smoothing", "text"]
    assert [each for each in reached if each in named] == named
    page.js("document.getElementById('step').focus()")
    assert page.texts("[data-metric='reward/mean'] .readout") == ["1"]
    page.press("ArrowLeft")
    assert page.texts("[data-metric='reward/mean'] .readout") == ["0.917"]
    assert page.texts("#toolbar output")[0] == "11"


STEPS = "[...document.querySelectorAll('#from, #until')].map((field) => Number(field.value))"
LAST_TICK = "[...document.querySelectorAll('[data-metric=\"reward/mean\"] .tick')].pop().textContent"


def test_curves_zoom_by_dragging_and_by_fields(page: Page, single: Path) -> None:
    page.open(single, 1440)
    assert page.js(STEPS) == [0, 12] and page.js("document.getElementById('everything').disabled")
    page.drag("[data-metric='kl'] .plot svg", 0.4, 0.8)
    first, last = page.js(STEPS)
    assert 0 < first < last < 12 and page.js(LAST_TICK) == str(last), "one range for all charts"
    assert page.js("document.querySelector('[data-metric=kl] .line').getBBox().width") > 100
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
    assert page.texts("[data-metric='reward/mean'] .readout") == [f"{last / 12:.3g}"], "the last step that is shown"
    page.js("document.querySelector('[data-metric=kl] .plot svg').dispatchEvent(new MouseEvent('dblclick'))")
    assert page.js(STEPS) == [0, 12] and page.js(LAST_TICK) == "12"
    page.js("""(() => { const field = document.getElementById("until"); field.value = "6";
        field.dispatchEvent(new Event("change")); })()""")
    assert page.js(STEPS) == [0, 6] and page.js(LAST_TICK) == "6"
    page.js("document.getElementById('everything').click()")
    assert page.js(STEPS) == [0, 12]


def test_a_logarithmic_scale(page: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    added = [{"entropy": 10.0 ** -line["step"], "grad_norm": line["step"]} for line in lines]
    (run / "metrics.jsonl").write_text("".join(
        json.dumps(line | more) + "\n" for line, more in zip(lines, added, strict=True)))  # fmt: skip
    page.open(write_report([run]), 1440)
    page.js("""(() => { const field = document.getElementById("smoothing"); field.value = 0;
        field.dispatchEvent(new Event("input")); })()""")
    heights = (
        "[...document.querySelectorAll('[data-metric=entropy] circle')].map((dot) => Number(dot.getAttribute('cy')))"
    )
    page.js("document.getElementById('log').click()")
    gaps = [after - before for before, after in itertools.pairwise(page.js(heights))]
    assert len(gaps) == 12 and max(gaps) - min(gaps) < 0.01 * gaps[0], "equal factors, equal distances"
    assert "linear: has values up to 0" in page.texts("[data-metric=grad_norm] .tick")
    assert "linear: has values up to 0" not in page.texts("[data-metric=entropy] .tick")
    page.js("document.getElementById('log').click()")
    assert page.js(heights)[1] - page.js(heights)[0] > 5 * gaps[0]


def test_runs_of_one_seed_are_no_seeds(page: Page, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("first", "again")]
    page.open(write_report([*runs, write_run(tmp_path / "other", batch_size=8)], tmp_path / "page.html"), 1440)
    assert page.texts(".legend label") == ["first … again (2 runs)", "other"]


@pytest.mark.parametrize("width", [390, 1440])
def test_answers_that_begin_alike_are_told_apart(page: Page, tmp_path: Path, width: int) -> None:
    """Names of rows keep to their place whatever their letters, and lose their middle."""
    kinds = [
        "W" * 59,
        "答案是" * 19,
        "".join(["🙂"] * 59),
        f"{'the same beginning of all ' * 2}red",
        f"{'the same ' * 6}blue",
    ]
    page.open(write_report([write_run(tmp_path / "run", text=lambda step, group, n: kinds[(step + n) % 5])]), width)
    names = "[...document.querySelectorAll('[data-map] .label')]"
    assert min(page.js(f"{names}.map((name) => name.getBBox().x)")) >= 0
    shown = page.js(f"{names}.map((name) => name.lastChild.textContent)")
    assert sum(name.endswith(("red", "blue")) and "…" in name for name in shown) == 2
    assert not any("\ud800" <= letter <= "\udfff" for name in shown for letter in name)


def test_runs_that_have_just_begun(page: Page, tmp_path: Path) -> None:
    """Without a step, without a line, without completions."""
    runs = [write_run(tmp_path / name) for name in ("nothing", "evaluated", "all")]
    (runs[0] / "metrics.jsonl").write_text("")
    (runs[1] / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/accuracy": 0.5}) + "\n")
    for run in runs[:2]:
        page.open(write_report([run]), 1440)
        assert page.texts(".overview dd")[0] == "0 of 12"
        assert page.texts("#answers .note") == page.texts("#count") == ["This run has no completions yet."]
    page.open(write_report([runs[2], runs[1]], tmp_path / "both.html"), 1440)
    heats = "[...document.querySelectorAll('.heat')].map((map) => map.checkVisibility())"
    assert page.js(heats) == [True] * 3
    page.js("location.hash = '#completion=1.2.3'")
    page.wait_for("document.getElementById('run').value === '1'")
    assert page.js(heats) == [False] * 3, "those of the run before"
    page.js("location.hash = '#completion=0.2.3'")
    page.wait_for("document.getElementById('run').value === '0'")
    assert page.js(heats) == [True] * 3


def test_every_curve_has_a_scale(page: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spans = {f"own/{n}": (low, low + span) for n, (low, span) in enumerate(
        itertools.product((0.77, 3.0, 1234.5, -0.6), (0.08, 0.011, 1.7, 26.0)))}  # fmt: skip
    for line in lines:
        line |= {name: high if line["step"] % 2 else low for name, (low, high) in spans.items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.open(write_report([run]), 1440)
    page.js("document.getElementById('others').open = true")
    page.wait_for("document.querySelectorAll('[data-metric^=\"own/\"] .line').length === 16")
    counts = page.js("""[...document.querySelectorAll("[data-metric^='own/']")].map((chart) =>
        chart.querySelectorAll(".rule").length)""")
    assert 2 <= min(counts) <= max(counts) <= 7


def test_theme_motion_and_paper(page: Page, single: Path) -> None:
    page.open(single, 1440, dark=False, prefers_reduced_motion="reduce")
    assert page.style("html", "scrollBehavior") == "auto"
    page.js("document.getElementById('theme').click()")
    assert page.style("body", "backgroundColor") == DARK
    assert len(page.send("Page.printToPDF")["data"]) > 50_000
    page.send("Emulation.setEmulatedMedia", media="print")
    assert (page.style("body", "backgroundColor"), page.style("#toolbar", "display")) == (LIGHT, "none")
    page.send("Emulation.setEmulatedMedia", media="")


def test_each_kind_of_alarm_is_listed_once(page: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "rings")
    spike = {"name": "grad_spike", "message": "the gradient's norm is 2", "advice": "Lower the rate."}
    lines = [spike | {"step": step} for step in range(1, 7)] + [{"step": 3, "name": "kl", "message": "far away"}]
    (run / "alarms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.open(write_report([run]), 1440)
    assert page.texts(".alarms summary") == ["7 alarms"]
    assert page.texts(".alarms li") == [
        "step 1: the gradient's norm is 2 (6 such alarms, the last at step 6). Lower the rate.",
        "step 3: far away",
    ]


def test_runs_side_by_side(page: Page, several: Path) -> None:
    page.open(several, 1440)
    reward = "document.querySelector('[data-metric=\"reward/mean\"]')"
    assert page.js(f"{reward}.querySelectorAll('.band').length") == 1  # two seeds are one line with their range
    assert page.texts(".legend label") == ["grpo (2 seeds)", "short"]
    assert page.texts(".numbers th[scope=col]")[-3:] == ["train.batch_size", "train.num_train_steps", "train.seed"]
    assert page.texts(".alarms li")[1].startswith("grpo_seed1, step 2: entropy fell. Lower the rate.")
    page.js("document.querySelector('.legend input').click()")
    assert page.js(f"{reward}.querySelectorAll('.line').length") == 1
    page.js("""(() => { const run = document.getElementById("run"); run.value = "2";
        run.dispatchEvent(new Event("change")); })()""")
    assert "of 6 steps" in page.texts("#count")[0]
