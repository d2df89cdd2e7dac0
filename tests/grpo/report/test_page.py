"""The HTML, Markdown and CSV: hostile content, chosen samples, clips, per-token figures, and the work of many runs."""

import base64
import csv
import html.parser
import io
import json
import re

import numpy as np
import pytest
import soundfile
from safetensors.numpy import save_file

from grpo.report.build import build
from grpo.report.read import read_run
from grpo.report.samples import Budget, Reader, choose, choose_steps
from tests.grpo.report.factory import group, healthy_rows, sweep, write_run

EVIL = [
    "</script><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", "<!--<script>", "]]>",
    "&lt;b&gt;", "<answer>", "</think><answer>bell</answer>", "\u2028\u2029\x00\x07", "\ud800 half", "x" * 100_000,
    "='cmd'|/C calc",
    "| a | b |\n\n# title `code` [link](javascript:1) ![x](http://example.invalid/x.png)", "${jndi}",
    "@CSS@ @DATA@ @JS@",
]  # fmt: skip


def build_page(folder, out, **options):
    build([folder], out, **options)
    return (out / "report.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


class Tags(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.seen = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def evil_run(folder):
    """Hostile text wherever a run can put text."""
    samples = []
    for i, text in enumerate(EVIL):
        rows = group(1, name=f"q{i}", right=2, question=text, gold=text, id=text, choices=[text, "b", 3, None])
        rows[0] |= {"completion": text, "audio": text, "rewards": {text[:50]: 1.0, "nan": float("nan")}}
        rows[1] |= {"reward": float("inf"), "advantage": "high", "tokens": None, "truncated": "yes", "rewards": [1]}
        rows[2] |= {"completion": None, "rewards": None}
        samples += rows
    rows = healthy_rows(30)
    rows[-1] |= {f"rewards/{EVIL[0]}/mean": 1.0, "reward": float("nan"), EVIL[1]: 2.0}
    write_run(folder, rows=rows, samples=samples, overrides=[f"{EVIL[0]}={EVIL[1]}", f"x={EVIL[10]}", "seed=0"])
    (folder / "failure.json").write_text(json.dumps({"error": EVIL[0] + EVIL[8]}))


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    root = tmp_path_factory.mktemp("evil")
    evil_run(root / "runs" / "<b>run&")
    write_run(root / "runs" / "good", overrides=["seed=1", "x=2"])
    page = build_page(root / "runs", root / "out")
    return root / "out", page


def test_hostile_text_adds_no_tag(evil, tmp_path):
    write_run(tmp_path / "runs" / "a")
    plain = build_page(tmp_path / "runs", tmp_path / "out")
    assert (
        Tags(evil[1]).seen[4:] == Tags(plain).seen[4:]
    )  # the same template (the fourth is the policy's hashes, equal too)
    assert [t for t, _ in Tags(evil[1]).seen].count("script") == 2


def test_hostile_text_arrives_whole_or_cut_with_a_note(evil):
    data = data_of(evil[1])
    texts = {r["text"] for g in data["groups"] for r in g["rows"]}
    assert EVIL[0] in texts and EVIL[8] in texts and EVIL[13] in texts
    long = max(texts, key=len)
    assert len(long) < 20_100 and long.endswith("[80,000 more characters]")


def test_the_page_needs_no_network_and_says_so(evil):
    policy = next(a["content"] for t, a in Tags(evil[1]).seen if a.get("http-equiv") == "Content-Security-Policy")
    assert (
        policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy and "http" not in policy
    )
    assert not [a for _, a in Tags(evil[1]).seen if {"src", "href", "style", "onclick"} & a.keys()]


def test_markdown_and_csv_of_hostile_text(evil):
    out, _ = evil
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text and "](" not in text.replace("\\](", "")
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert len(widths) <= 3  # one for each table
    cells = [c for row in csv.reader(io.StringIO((out / "report.csv").read_text(encoding="utf-8"))) for c in row]
    assert not [c for c in cells if c[:1] in ("=", "@", "+") or (c[:1] == "-" and not c[1:2].isdigit())]


def test_numbers_are_strict_json(evil):
    text = re.search(r'id="data">(.*?)</script>', evil[1], re.DOTALL)[1]
    json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} in the page"))
    assert text.isascii()


# ---------------------------------------------------------------- samples


def many(path, steps: int, questions: int = 4) -> None:
    with path.open("w") as file:
        for step in range(1, steps + 1):
            for q in range(questions):
                file.writelines(json.dumps(r) + "\n" for r in group(step, 4, name=f"q{q}", right=q % 5))


def test_a_step_is_found_without_reading_the_file(tmp_path):
    many(tmp_path / "samples.jsonl", 500)
    for step in (1, 2, 250, 499, 500):
        reader = Reader(tmp_path / "samples.jsonl")
        rows = reader.step(step)
        assert len(rows) == 16 and {r["step"] for r in rows} == {step}
        assert reader.lines < 300, "of 8000 lines"
    assert Reader(tmp_path / "samples.jsonl").step(501) == [] and Reader(tmp_path / "samples.jsonl").step(0) == []


def test_a_step_is_found_among_corrupt_lines(tmp_path):
    many(tmp_path / "samples.jsonl", 100)
    lines = (tmp_path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    lines[::7] = [b"\xff{half\n"] * len(lines[::7])
    (tmp_path / "samples.jsonl").write_bytes(b"".join(lines)[:-20])
    for step in (1, 50, 100):
        assert 10 <= len(Reader(tmp_path / "samples.jsonl").step(step)) <= 15


def test_steps_are_chosen_for_a_reason(tmp_path):
    rows = healthy_rows(100)
    rows[37]["reward"], rows[59]["reward"], rows[71]["completions/clipped_ratio"] = 9.0, -9.0, 0.9
    why = choose_steps(read_run(write_run(tmp_path / "r", rows=rows)))
    assert why[1] == ["first step"] and "last step" in why[100] and why[37] == ["best reward"]
    assert why[59] == ["worst reward"] and why[71] == ["most truncated"] and "most zero-variance" in str(why)


def test_each_kind_of_group_comes_first_and_the_rest_is_counted(tmp_path):
    samples = [
        r for s in (1, 2) for k in range(9) for r in group(s, name=f"q{k}", right=(4, 4, 4, 2, 2, 0, 0, 1, 1)[k])
    ]
    run = read_run(write_run(tmp_path / "r", rows=healthy_rows(2), samples=samples))
    chosen, seen = choose(run, Budget(), 6)
    kinds = {(g["step"], g["flags"]["zero_variance"], g["flags"]["right"]) for g in chosen}
    assert kinds == {(s, z, r) for s in (1, 2) for z, r in ((False, True), (True, False), (True, True))}
    assert len(chosen) == 6 and 16 <= seen["about"] <= 20 and all(len(g["rows"]) == 4 for g in chosen)


def test_the_page_says_how_much_was_left_out(tmp_path):
    many(write_run(tmp_path / "r", rows=healthy_rows(300)) / "samples.jsonl", 300)
    data = data_of(build_page(tmp_path, tmp_path / "out", budget=Budget(groups=10)))
    assert len(data["groups"]) == 10 and "10 of about 1,2" in data["samplesNote"]
    assert any("questions stay in the runs' samples.jsonl" in t for t in data["leftOut"])


# ---------------------------------------------------------------- clips and tokens


def sound(path, seconds=1.0, hz=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(np.arange(int(seconds * hz)) / 10), hz)
    return str(path)


def clip_run(folder, clips, **changes):
    samples = [r for i, c in enumerate(clips) for r in group(1, name=f"q{i}", audio=c, **changes)]
    return write_run(folder, rows=healthy_rows(1), samples=samples)


def test_clips_are_embedded_cut_and_missing_ones_shown(tmp_path):
    long = sound(tmp_path / "long.flac", 40)
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, 0.2 * np.random.default_rng(0).standard_normal((44100, 2)), 44100)
    (tmp_path / "text.flac").write_text("no sound")
    clip_run(
        tmp_path / "r", [long, str(stereo), str(tmp_path / "text.flac"), "nowhere.flac", 5, "/dev/zero", "a\0b", long]
    )
    data = data_of(build_page(tmp_path / "r", tmp_path / "out"))
    by_id = {g["id"]: g for g in data["groups"]}
    assert len(data["clips"]) == 2 and by_id["q0-1"]["clip"] == by_id["q7-1"]["clip"]
    samples, hz = soundfile.read(io.BytesIO(base64.b64decode(data["clips"][by_id["q0-1"]["clip"]])))
    assert hz == 16000 and len(samples) == 30 * 16000 and "the first 30 of 40 s" in by_id["q0-1"]["clipNote"]
    assert soundfile.info(io.BytesIO(base64.b64decode(data["clips"][by_id["q1-1"]["clip"]]))).channels == 1
    assert "not readable" in by_id["q2-1"]["clipNote"] and "not found" in by_id["q3-1"]["clipNote"]
    assert all(by_id[f"q{i}-1"]["clip"] is None for i in (2, 3, 4, 5, 6))


def test_a_stretch_of_a_clip_is_that_stretch(tmp_path):
    clip_run(tmp_path / "r", [sound(tmp_path / "c.flac", 3)], start=1.0, end=1.5)
    (clip,) = data_of(build_page(tmp_path / "r", tmp_path / "out"))["clips"].values()
    assert soundfile.info(io.BytesIO(base64.b64decode(clip))).frames == 8000


def test_clips_beyond_the_budget_are_counted(tmp_path):
    clip_run(tmp_path / "r", [sound(tmp_path / f"{i}.flac", 1 + i / 10) for i in range(5)])
    data = data_of(build_page(tmp_path / "r", tmp_path / "out", budget=Budget(clip_bytes=12_000)))
    assert 0 < len(data["clips"]) < 5
    assert f"{5 - len(data['clips'])} clips left out" in " ".join(data["leftOut"])


def record(folder, step, texts, **tensors):
    where = folder / "rollouts" / f"step-{step:06d}"
    where.mkdir(parents=True)
    (where / "step.json").write_text(json.dumps({"step": step, "token_texts": texts}))
    save_file(tensors, where / "tensors.safetensors")


def test_per_token_figures_by_hand(tmp_path):
    folder = write_run(tmp_path / "r", rows=healthy_rows(1), samples=group(1, 2, name="a") + group(1, 2, name="b"))
    old = np.array([[-1.0, -2.0, 0.0]] * 4, np.float32)
    shift = np.array([[0.0], [0.0], [0.0], [np.log(2)]], np.float32)
    record(folder, 1, [["a", "b"], ["a", "b", "c"], ["a"], ["<answer>", "x", "</answer>"]], old_logp_NT=old,
           logp_NT=old + shift, ref_logp_NT=old, sampler_logp_NT=old - np.float32(np.log(4)),
           entropy_NT=np.full((4, 3), np.nan, np.float32), advantage_N=np.zeros(4, np.float32))  # fmt: skip
    groups = data_of(build_page(folder, tmp_path / "out"))["groups"]
    row = next(g for g in groups if g["id"] == "b-1")["rows"][1]["figures"]
    # logp - old = log 2: ratio 2; ref - logp = -log 2: k3 = 1/2 + log 2 - 1 = 0.1931; old - sampler = log 4: 4
    assert row["t"] == ["<answer>", "x", "</answer>"] and row["ratio"] == [2.0] * 3 and row["sampler"] == [4.0] * 3
    assert row["kl"] == [0.1931] * 3 and row["entropy"] == [None] * 3
    assert len(groups[0]["rows"][0]["figures"]["ratio"]) == 2 and "tokens recorded" in groups[0]["why"]


@pytest.mark.parametrize("broken", ["json", "tensors", "rows", "texts"])
def test_a_broken_recording_costs_only_itself(tmp_path, broken):
    folder = write_run(tmp_path / "r", rows=healthy_rows(1), samples=group(1, 4))
    old = np.zeros((2 if broken == "rows" else 4, 3), np.float32)
    record(folder, 1, [["a"]] * (1 if broken == "texts" else 4), old_logp_NT=old, logp_NT=old)
    where = folder / "rollouts" / "step-000001"
    if broken in ("json", "tensors"):
        (where / {"json": "step.json", "tensors": "tensors.safetensors"}[broken]).write_bytes(b"\xff" * 100)
    (g,) = data_of(build_page(folder, tmp_path / "out"))["groups"]
    assert all(r["figures"] is None and r["text"] for r in g["rows"]) and "recorded tokens" in g["note"]


# ---------------------------------------------------------------- many runs


def test_fifty_runs_of_five_hundred_steps(tmp_path, monkeypatch):
    """Work, not seconds: lines of samples parsed, points and bytes on the page. samples.jsonl has 8000 lines a run."""
    many(tmp_path / "samples.jsonl", 500)
    for loss in range(10):
        for seed in range(5):
            folder = write_run(tmp_path / "m" / f"{loss}-{seed}", overrides=[f"loss=l{loss}", f"seed={seed}"],
                               rows=healthy_rows(500, seed), samples=[])  # fmt: skip
            (folder / "samples.jsonl").unlink()
            (folder / "samples.jsonl").hardlink_to(tmp_path / "samples.jsonl")
    parsed = []
    step = Reader.step
    monkeypatch.setattr(Reader, "step", lambda self, s: (step(self, s), parsed.append(self.lines))[0])
    page = build_page(tmp_path / "m", tmp_path / "out")
    data = data_of(page)
    assert (
        len(data["runs"]) == 50 and len(data["settings"]) == 10 and data["settings"][0]["estimates"]["reward"][2] == 5
    )
    assert max(parsed) < 2500, "of 8000 lines in each file"
    assert max(len(c["x"]) for c in data["curves"]) <= 200 and len(data["groups"]) <= 240
    assert len(page) < 8_000_000


def test_the_page_of_a_sweep(tmp_path):
    data = data_of(build_page(sweep(tmp_path / "s"), tmp_path / "out", baseline="grpo"))
    assert data["columns"] == ["loss", "seed"] and [s["label"] for s in data["settings"]] == ["loss=dapo", "loss=grpo"]
    assert {r["label"] for r in data["runs"]} == {""}  # their names say it
    pair = data["paired"][0]
    assert (pair["metric"], pair["n"]) == ("accuracy/final", 3) and pair["mean"] == pytest.approx(0.06)
    assert data["chance"] == 0.25 and "200 held-out questions" in data["pairedNote"]
    curve = data["curves"][0]
    assert curve["own"]["accuracy/heldout"][0] == [0, 25, 50, 60] and len(curve["m"]["reward"]) == 60
