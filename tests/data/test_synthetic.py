"""Made-up sounds: the same bytes every time, nothing but the sound tells the answer, and the sound does tell it."""

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.audio import load
from data.synthetic import KINDS, TASKS, questions

ALL = {"kinds": 14, "tasks": list(TASKS)}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return questions(tmp_path_factory.mktemp("kinds"), split="train", count=256)


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    return questions(tmp_path_factory.mktemp("hard"), split="train", count=448, **ALL)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_same_arguments_same_bytes(tmp_path):
    for name in ("a", "b"):
        assert len(questions(tmp_path / name, split="train", count=30, **ALL)) == 30
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    questions(tmp_path / "c", split="train", count=30, **ALL, seed=1)
    [a], [c] = ([load(p).sha256 for p in (tmp_path / x).rglob("*-00000.flac")] for x in "ac")
    assert a != c


def test_written_once_and_beside_other_arguments(tmp_path):
    first = questions(tmp_path, split="train", count=4)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert questions(tmp_path, split="train", count=4).questions == first.questions
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == times
    questions(tmp_path, split="train", count=5)
    questions(tmp_path, split="eval", count=4)
    assert len(list(tmp_path.iterdir())) == 3
    assert not list(tmp_path.glob(".*"))


def test_two_writers_at_once(tmp_path):
    done, together = [], threading.Barrier(3)

    def work():
        together.wait()
        done.append(questions(tmp_path, split="train", count=12).questions)

    threads = [threading.Thread(target=work) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(done) == 3 and done[0] == done[1] == done[2] and len(done[0]) == 12
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        questions(tmp_path / "file", split="train", count=1)


def test_no_row_is_bad_and_every_clip_loads(hard):
    assert not hard.problems and len(hard) == 448
    for q in hard:
        assert 0.4 < load(q.audio, max_seconds=3.0).seconds


def test_splits_share_no_clip(tmp_path):
    one, other = (questions(tmp_path, split=s, count=40) for s in ("train", "eval"))
    assert not {load(q.audio).sha256 for q in one} & {load(q.audio).sha256 for q in other}
    assert not {q.id for q in one} & {q.id for q in other}


def test_places_of_the_gold_are_balanced(kinds, hard):
    """Overall to within one, and for each gold by itself: no option may be right more often for one answer."""
    places = Counter((q.gold, q.answer) for q in kinds)
    assert set(places.values()) == {8} and len(places) == 32
    for task in TASKS:
        mine = [q for q in hard if q.task == task]
        assert len(mine) == 112
        for part in ("gold", "answer"):
            counts = Counter(getattr(q, part) for q in mine).values()
            assert max(counts) - min(counts) <= 1, (task, part)
        pairs = Counter((q.gold, q.answer) for q in mine)
        golds, number = {q.gold for q in mine}, len(mine[0].choices)
        assert len(pairs) == len(golds) * number, task  # every gold at every place


def test_distractors_are_uniform(kinds):
    """Kind by kind: 256 questions show 256 * 3 distractors, 96 of each of 8 kinds; 4 deviations are allowed."""
    counts = Counter(c for q in kinds for c in q.choices if c != q.gold)
    assert len(counts) == 8 and max(abs(n - 96) for n in counts.values()) < 4 * (256 * 3 / 8 * 5 / 8) ** 0.5


def test_the_second_sound_is_always_an_option(hard):
    """An order question whose second sound is not offered would be answered without hearing an order."""
    from data.synthetic import _order

    time = np.arange(16000) / 16000
    for seed in range(20):
        _, forced, others = _order(time, "noise", list(KINDS), np.random.default_rng(seed))
        assert len(forced) == 1 and not {"noise", forced[0]} & set(others)


@pytest.mark.parametrize("measure", ["seconds", "peak", "hz", "channels"])
def test_nothing_but_the_sound_tells_the_kind(kinds, measure):
    """Between-kind share of the variance of each nuisance, against 300 shuffles of the kinds: not in the top 0.5%."""
    values = []
    for q in kinds:
        info = soundfile.info(q.audio)
        wave = soundfile.read(q.audio, always_2d=True)[0].mean(axis=1)
        values.append({"seconds": info.duration, "peak": np.abs(wave).max(), "hz": info.samplerate,
                       "channels": info.channels}[measure])  # fmt: skip
    values, gold = np.array(values, float), np.array([q.gold for q in kinds])

    def between(labels):
        return np.var([values[labels == k].mean() for k in set(gold)])

    rng = np.random.default_rng(0)
    shuffled = sorted(between(rng.permutation(gold)) for _ in range(300))
    assert between(gold) <= shuffled[-2]


def test_the_sound_tells_the_kind(kinds):
    """Nearest mean of coarse spectra and their change over time: a crude listener gets more than 80% right."""

    def listen(q):
        wave = load(q.audio).samples
        frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::256] * np.hanning(512)
        power = np.stack([b.sum(1) for b in np.array_split(np.abs(np.fft.rfft(frames)) ** 2, 16, axis=1)], 1)
        power = np.log(power / power.sum() + 1e-5)
        third = max(1, len(power) // 3)
        return np.concatenate([power[:third].mean(0), power[-third:].mean(0), power.std(0)])

    x, gold = np.stack([listen(q) for q in kinds]), np.array([q.gold for q in kinds])
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    half = len(x) // 2
    means = {k: x[:half][gold[:half] == k].mean(0) for k in set(gold)}
    said = [min(means, key=lambda k: ((v - means[k]) ** 2).sum()) for v in x[half:]]
    assert np.mean(said == gold[half:]) > 0.8


def test_count_and_pitch_are_what_they_say():
    from data.synthetic import NUMBERS, _count, _pitch

    time = np.arange(32000) / 16000
    for seed in range(10):
        for n, word in enumerate(NUMBERS, start=1):
            wave, _, _ = _count(time, word, [], np.random.default_rng(seed))
            loud = np.convolve(np.abs(wave), np.ones(64) / 64, "same") > 0.1
            assert np.sum(np.diff(np.concatenate([[0], loud.astype(int)])) == 1) == n
        for gold in ("higher", "lower"):
            wave, _, _ = _pitch(time, gold, [], np.random.default_rng(seed))
            first, second = (np.abs(np.fft.rfft(part)).argmax() for part in np.split(wave, 2))
            assert (second > first) == (gold == "higher")


def test_first_words_differ_and_there_are_twelve_kinds():
    assert len({name.split()[0] for name in KINDS}) == len(KINDS) >= 12


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "test"}, "unknown split 'test'"),
        ({"kinds": ["bark"]}, "unknown kind 'bark'"),
        ({"tasks": ["sing"]}, "unknown task 'sing'"),
        ({"kinds": 3}, "options=4"),
        ({"count": 0}, "count=0"),
    ],
)
def test_wrong_arguments(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        questions(tmp_path, **{"split": "train", "count": 1} | wrong)
    assert not list(tmp_path.iterdir())
