"""`grpo.evaluate` from manifest to table: every item counted, resumed after a kill, refused where settings differ."""

import json
from dataclasses import replace

import pytest
import soundfile
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from data import manifest
from grpo.config import ConfigError
from grpo.display import Display
from grpo.evaluate import evaluate, lists
from tests.conftest import make_clip, make_question


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Six good rows (one without its file) and a bad one."""
    root = tmp_path_factory.mktemp("bench")
    questions = []
    for i in range(6):
        clip = make_clip(i)
        if i != 4:
            soundfile.write(root / f"{i}.wav", clip.samples, clip.hz)
        questions.append(make_question(f"q{i}", audio=root / f"{i}.wav", answer=i % 4, task="sound"))
    manifest.write(root / "toy.jsonl", questions, root)
    with (root / "toy.jsonl").open("a") as file:
        file.write('{"id": "bad", "audio": "0.wav", "question": "?", "choices": ["a"], "answer": 0}\n')
    return root / "toy.jsonl"


def run(checkpoint, bench, folder, *words, prompt="short"):
    words = [f"prompt={prompt}", *words] if prompt else words
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("evaluate", lists([
            f"model={checkpoint}", "bench=heldout", f"bench.heldout.path={bench}", "max_tokens=8",
            "batch=4", *words,
        ]))  # fmt: skip
    OmegaConf.resolve(cfg)
    return evaluate(cfg, folder, Display())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(checkpoint, bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(checkpoint, bench, folder, "probes=[silent,no_audio,shuffled,permuted,always_a]")


def test_every_item_is_there(whole):
    folder, metrics = whole
    rows = lines(folder / "heldout" / "predictions.jsonl")
    assert [r["id"] for r in rows] == [*(f"q{i}" for i in range(6)), "bad"]
    states = {r["id"]: r["state"] for r in rows}
    assert (states["q4"], states["bad"]) == ("audio error", "bad row") and "missing" in rows[4]["problem"]
    figures = metrics["benches"]["heldout"]
    assert figures["total"]["strict"]["n"] == figures["total"]["official"]["n"] == 7
    assert set(figures["probes"]) == {"silent", "no_audio", "shuffled", "permuted", "always_a"}
    # always A: q0 and q4 have gold A, and no sound is needed for it
    assert figures["probes"]["always_a"]["total"]["strict"]["right"] == 2
    assert "1 rows could not be used" in figures["note"]
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert "| all |  | 7 |" in (folder / "table.md").read_text()
    assert metrics["settings"]["decoding"]["greedy"] and len(metrics["settings"]["prompt_hash"]) == 12


def test_withheld_answers_are_predicted_and_not_scored(checkpoint, bench, tmp_path):
    rows = [json.loads(line) for line in bench.read_text().splitlines()]
    rows[0]["answer"] = None
    hidden = bench.with_name("hidden.jsonl")
    hidden.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    figures = run(checkpoint, hidden, tmp_path, "probes=[permuted]")["benches"]["heldout"]
    assert figures["total"]["strict"]["n"] == 2 and "1 answers are withheld" in figures["note"]
    first = lines(tmp_path / "heldout" / "predictions.jsonl")[0]
    assert first["hidden"] and first["gold"] is None and not first["official"] and first["completion"]


def test_the_official_file_holds_every_item(bench, tmp_path):
    from dataclasses import replace as changed

    from data.submission import read as official
    from grpo.evaluate import submit

    rows = [{"id": f"q{i}", "chosen": c, "answer": "x", "think": "so"} for i, c in enumerate([1, None])]
    questions = [make_question(f"q{i}", benchmark="mmar", meta={"row": {"id": f"q{i}"}}) for i in range(3)]
    path = submit(tmp_path, questions, rows)
    assert path.name == "submission.jsonl"
    assert [(row["id"], said, why) for row, said, why in official(path, "mmar")] == [
        ("q0", "rain", "so"), ("q1", "x", "so"), ("q2", "", "")
    ]  # fmt: skip
    assert submit(tmp_path, [changed(q, meta=None) for q in questions], rows) is None
    assert submit(tmp_path, [changed(q, benchmark=None) for q in questions], rows) is None


def test_killed_and_resumed_is_the_same(checkpoint, bench, whole, tmp_path):
    done = (whole[0] / "heldout" / "predictions.jsonl").read_text()
    run(checkpoint, bench, tmp_path)
    path = tmp_path / "heldout" / "predictions.jsonl"
    assert path.read_text() == done
    path.write_text(done[: len(done) // 2])  # in the middle of a line
    run(checkpoint, bench, tmp_path, "resume=true")
    assert path.read_text() == done
    with pytest.raises(ConfigError, match="already holds an evaluation"):
        run(checkpoint, bench, tmp_path)
    with pytest.raises(ConfigError, match="resume=true, but decoding differ"):
        run(checkpoint, bench, tmp_path, "resume=true", "max_tokens=9")


def test_against_itself(checkpoint, bench, whole, tmp_path):
    figures = run(checkpoint, bench, tmp_path, f"against={whole[0]}")["benches"]["heldout"]["against"]
    assert figures["strict"]["n"] == 7 and figures["strict"]["p"] == 1.0 and figures["official"]["difference"] == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("probes=[loud]", "probes: 'loud' is not one of silent"),
        ("against=nowhere", "against=nowhere: .* does not exist"),
        ("batch=0", "batch must be at least 1"),
        ("bench.heldout.path=nowhere.jsonl", "no manifest nowhere.jsonl"),
        ("+bench.heldout.rul=x", "bench.heldout: 'rul' is not one of"),
        ("model=nowhere", "there is no model nowhere"),
        ("think_words=x", "think_words must be int or null"),
    ],
)
def test_mistakes_are_one_line(checkpoint, bench, tmp_path, word, message):
    with pytest.raises(ConfigError, match=message):
        run(checkpoint, bench, tmp_path, word)


def test_a_model_without_a_prompt_asks_for_one(checkpoint, bench, tmp_path):
    with pytest.raises(ConfigError, match="does not say which prompt"):
        run(checkpoint, bench, tmp_path, prompt=None)


def test_commas_ask_benchmarks_together():
    assert lists(["bench=a,b", "model=m", "bench.a.path=x"]) == ["bench=[a,b]", "weights=m", "bench.a.path=x"]
    assert lists(["bench=[a]"]) == ["bench=[a]"]


def test_the_official_rule_reads_the_bare_text():
    from grpo.evaluate import official_text
    from grpo.predict import read

    answer = read(replace(make_question("q"), answer=1), "<answer>B. rain</answer>")
    assert official_text(answer, "mmau") == "rain" and official_text(answer, "mmsu") == "B"
    # of a musical "Drums" the published rule makes the letter D
    answer = read(make_question("q", choices=("Drums", "Bass"), answer=0), "<answer>Drums</answer>")
    assert official_text(answer, "muchomusic") == "A"


def test_a_bad_row_takes_no_other_rows_place(tmp_path):
    """A row whose fault is its id, and two bad rows of one id: nobody's answer is overwritten by id."""
    from grpo.benchmark import Benchmark
    from grpo.evaluate import bad_rows

    row = {"id": "a", "audio": "a.wav", "question": "?", "choices": ["x", "y"], "answer": 0}
    bad = row | {"id": "b", "answer": 7}
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (row, row, bad, bad, bad | {"id": "c"})))
    read = manifest.read(path)
    rows = bad_rows(Benchmark("toy", path, "", "mmau", None, read.questions, read.problems))
    assert [r["id"] for r in rows] == ["line 2", "line 3", "line 4", "c"] and not any(r["strict"] for r in rows)


def test_a_file_of_something_else_is_left_alone(tmp_path):
    from grpo.evaluate import keep_whole

    path = tmp_path / "x.jsonl"
    for text in ("my notes\n", '{"id": "a", "audio": "x"}\n{"id"', "[1]\n", "[" * 9999 + "\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"line 1 of .* is no prediction"):
            keep_whole(path)
        assert path.read_text() == text
    whole = json.dumps({"id": "é", "state": "ok"}, ensure_ascii=False).encode() + b"\n"
    for cut in range(1, len(whole)):  # in the middle of a character too
        path.write_bytes(whole + whole[:cut])
        assert list(keep_whole(path)) == ["é"] and path.read_bytes() == whole


def test_clips_that_lie_elsewhere_are_no_result_of_zero(tmp_path):
    from grpo.benchmark import open_benchmark

    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").touch()
    row = {"id": "a", "audio": "a.wav", "question": "?", "choices": ["x", "y"], "answer": 0}
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | {'id': 'b', 'audio': 'b.wav'})}\n")
    spec = {"path": str(tmp_path / "m.jsonl"), "rule": "mmar"}
    with pytest.raises(ConfigError, match=r"no clip of .* is there, such as .*a\.wav: set bench\.toy\.root"):
        open_benchmark("toy", spec)
    found = open_benchmark("toy", spec | {"root": str(tmp_path / "clips")})
    assert len(found.questions) == 2  # one that lacks is a wrong answer


def test_every_benchmark_that_is_prepared_can_be_asked():
    from data.sources import sources

    for name in [source.name for source in sources().values() if source.benchmark]:
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose("evaluate", [f"bench=[{name}]", "weights=m"])
        spec = OmegaConf.to_container(cfg.bench, resolve=True)[name]
        assert spec["rule"] == name and spec["path"].endswith(f"/{name}.jsonl")
