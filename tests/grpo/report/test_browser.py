"""The page in a real headless Chromium, from file://: it draws, filters, plays, explains, asks for nothing."""

import pytest

from grpo.report.build import build
from tests.grpo.report import chromium
from tests.grpo.report.factory import group, healthy_rows, sweep, write_run
from tests.grpo.report.test_page import evil_run, record, sound

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.find() is None, reason="no Chromium here (variable CHROMIUM names one)"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    import numpy as np

    root = tmp_path_factory.mktemp("report")
    sweep(root / "s")
    clip = sound(root / "bell.flac", 1.5)
    samples = []
    for step in (1, 30, 60):
        for k, right in enumerate((0, 2, 4)):
            samples += group(step, name=f"q{k}", right=right, audio=clip, truncated=k == 0)
        if step == 1:
            samples += group(1, name="q5", right=0, question="How long?", choices=["below <5 s", "b"], answered=0)
    folder = write_run(root / "s" / "loss=mine,seed=0", overrides=["loss=mine", "seed=0"], rows=healthy_rows(60),
                       samples=samples)  # fmt: skip
    old = np.full((12, 6), -1.0, np.float32)
    texts = [["<think>", "a ring", "</think>", "<answer>", "bell", "</answer>"]] * 12
    record(folder, 60, texts, old_logp_NT=old, logp_NT=old + np.float32(np.log(1.25)), ref_logp_NT=old)
    evil_run(root / "s" / "<b>evil&")
    build([root / "s"], root / "out", baseline="loss=grpo,seed=0")
    return root / "out" / "report.html"


@pytest.fixture(scope="module", params=["light", "dark"])
def page(request, report, tmp_path_factory):
    page = chromium.Page(chromium.find(), tmp_path_factory.mktemp("browser"), dark=request.param == "dark")
    page.open(report)
    yield page
    page.close()


@pytest.fixture(autouse=True)
def quiet(page):
    yield
    page.js("1")  # whatever was still on its way
    assert page.errors == []
    assert not [r for r in page.requests if not r.startswith(("file:", "data:", "about:"))]
    assert page.js("window.hacked") is None


def choose(page, label, text):
    page.js(f"""(() => {{ const s = document.querySelector('select[aria-label="{label}"]');
        s.value = [...s.options].find(o => o.textContent.includes({text!r})).value;
        s.dispatchEvent(new Event("change")); }})()""")


def count(page, selector):
    return page.js(f"document.querySelectorAll({selector!r}).length")


def test_tables_sort_by_a_click(page):
    heads = page.js("[...document.querySelectorAll('#settings th')].map(h => h.textContent)")
    at = heads.index("loss")
    rows = f"[...document.querySelectorAll('#settings tbody tr')].map(r => r.cells[{at}].textContent)"
    assert sorted(page.js(rows)) == ["dapo", "grpo", "grpo", "mine"]
    page.click(f"#settings th:nth-child({at + 1})")
    assert page.js(rows) == ["mine", "grpo", "grpo", "dapo"]
    page.click(f"#settings th:nth-child({at + 1})")
    assert page.js(rows) == ["dapo", "grpo", "grpo", "mine"]
    assert "+0.060" in page.js("document.getElementById('paired').textContent")


def test_curves_draw_and_explain_themselves(page):
    assert count(page, ".chart") >= 10 and count(page, ".chart .band") > 0
    first = page.js("document.querySelector('.chart .line').getAttribute('d')")
    assert first.startswith("M") and "NaN" not in page.js("document.querySelector('.charts').innerHTML")
    ticks = page.js("""[...document.querySelectorAll('.chart svg')].map(s =>
        [...s.querySelectorAll('text[text-anchor=end]')].map(t => t.textContent))""")
    assert all(len(set(labels)) == len(labels) >= 2 for labels in ticks), ticks
    assert page.js("Math.min(...[...document.querySelectorAll('.chart svg text')].map(t => t.getBBox().x))") >= 0
    page.hover(".chart:nth-child(2) svg")
    assert page.js("document.getElementById('tip').hidden") is False
    assert "step" in page.js("document.getElementById('tip').textContent")
    before = count(page, ".chart:first-child .line")
    page.click("#curves .bar button:nth-child(2)")
    assert count(page, ".chart:first-child .line") > before
    page.click("#curves .bar button:nth-child(1)")
    page.click(".legend button")
    assert count(page, ".charts .dim") > 0
    page.click(".legend button")


def test_samples_filter(page):
    shown = "document.querySelectorAll('.list button').length"
    everything = page.js(shown)
    page.click('[data-kind="zero_variance"]')
    zero = page.js(shown)
    page.click('[data-kind="right"]')
    both = page.js(shown)
    assert everything > zero > both > 0
    assert page.js("document.getElementById('count').textContent").startswith(f"{both} of ")
    page.click('[data-kind="zero_variance"]')
    page.click('[data-kind="right"]')
    choose(page, "Run", "mine")
    choose(page, "Step", "60")
    assert page.js(shown) == 3
    page.click('[data-kind="truncated"]')
    assert page.js(shown) == 1
    page.click('[data-kind="truncated"]')
    choose(page, "Step", "all")
    choose(page, "Run", "all")
    assert page.js(shown) == everything


def test_options_say_how_often_they_were_answered(page):
    choose(page, "Run", "mine")
    choose(page, "Step", "60")
    given = "[...document.querySelectorAll('.choices .n')].map(n => n.textContent)"
    page.js("[...document.querySelectorAll('.list button')].find(b => b.textContent.includes('●●○○')).click()")
    assert page.js(given) == ["1", "1", "2", ""]  # dog, rain, bell twice
    choose(page, "Step", "1")
    page.js("[...document.querySelectorAll('.list button')].find(b => b.textContent.includes('How long')).click()")
    assert page.js(given) == ["4", ""]  # as the samples say: the page reads no answer out of a completion
    choose(page, "Step", "all")
    choose(page, "Run", "all")


def test_a_clip_plays(page):
    choose(page, "Run", "mine")
    page.click(".list button:nth-child(2)")
    page.until("document.querySelector('audio').readyState >= 1")
    assert page.js("document.querySelector('audio').duration") == pytest.approx(1.5, abs=0.01)
    page.js("document.querySelector('audio').play().then(() => true)")
    page.until("document.querySelector('audio').currentTime > 0.1")
    choose(page, "Run", "all")


def test_completions_are_marked_and_tokens_explained(page):
    choose(page, "Run", "mine")
    choose(page, "Step", "60")
    assert count(page, ".card") == 4 and count(page, ".card .answer") >= 4 and count(page, ".card .think") >= 4
    choose(page, "Colour tokens by", "ratio")
    page.hover(".card .tok[data-i='1']")
    tip = page.js("document.getElementById('tip').textContent")
    assert '"a ring"' in tip and "1.250" in tip and "KL" in tip and "advantage" in tip
    choose(page, "Colour tokens by", "nothing")
    choose(page, "Step", "all")
    choose(page, "Run", "all")


def test_hostile_text_is_text(page):
    choose(page, "Run", "evil")
    for i in range(page.js("document.querySelectorAll('.list button').length")):
        page.js(f"document.querySelectorAll('.list button')[{i}].click()")
        assert count(page, "#main script, #main img, #main b:empty") == 0
    choose(page, "Run", "all")
    assert "window.hacked=1" in page.js("document.body.textContent")


def test_the_keyboard_walks_the_list(page):
    page.js("document.querySelector('.list button').focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowDown", code="ArrowDown")
    assert page.js("document.querySelectorAll('.list button')[1].getAttribute('aria-pressed')") == "true"


def test_it_fits_a_narrow_window(page):
    page.call("Emulation.setDeviceMetricsOverride", width=420, height=800, deviceScaleFactor=1, mobile=False)
    assert page.js("document.documentElement.scrollWidth") <= 420
    page.call("Emulation.setDeviceMetricsOverride", width=1360, height=900, deviceScaleFactor=1, mobile=False)
