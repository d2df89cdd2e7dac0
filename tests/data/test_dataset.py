"""What is accepted, what is left out and when that is too much; held out means held out."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile

from data.audio import ClipError
from data.dataset import DataError, Dataset
from data.manifest import Manifest, Problem
from data.question import Question
from data.sampler import Sampler


def questions(folder, split, n, bad=()):
    """n questions with a clip of half a second each; those in `bad` are silent."""
    made = []
    for i in range(n):
        audio = folder / f"{split}{i}.wav"
        rng = np.random.default_rng([i, len(split)])
        soundfile.write(audio, 0.1 * rng.standard_normal(8000) * (i not in bad), 16000)
        made.append(Question(f"{split}{i}", audio, "Which?", ("a", "b"), i % 2))
    return made


@pytest.fixture
def splits(tmp_path):
    return questions(tmp_path, "train", 10), questions(tmp_path, "eval", 5)


def test_plain_iterables_will_do(splits):
    train, held_out = splits
    dataset = Dataset((q for q in train), held_out)
    assert (dataset.train, dataset.eval, dataset.problems) == (train, held_out, [])
    assert dataset.clip(train[0]).samples.shape == (8000,)


@pytest.mark.parametrize(("verify", "left_out"), [("decode", 2), ("header", 1), ("none", 0)])
def test_verify(tmp_path, splits, verify, left_out):
    train = questions(tmp_path, "train", 10, bad={3})  # silent: only decoding tells
    train[7].audio.write_bytes(b"")  # a header check tells
    dataset = Dataset(train, splits[1], verify=verify, max_bad_fraction=0.2)
    assert (len(dataset.problems), len(dataset.unreadable)) == (left_out, left_out)
    assert dataset.train == train and len(dataset.readable) == 10 - left_out
    assert {p.reason for p in dataset.problems} <= {"silent", "empty"}
    with pytest.raises(ClipError):  # what was not looked for is found when the clip's turn comes
        dataset.clip(train[3])


def test_what_could_be_read_that_day_moves_no_other_question(tmp_path, splits):
    train, held_out = splits
    whole = Dataset(train, held_out)
    train[4].audio.unlink(), held_out[1].audio.unlink()
    later = Dataset(train, held_out, max_bad_fraction=0.2)
    assert later.unreadable == {"train4": "missing", "eval1": "missing"}
    assert (later.train, later.eval, later.fingerprint) == (whole.train, whole.eval, whole.fingerprint)
    for step in range(7):
        before, now = (Sampler(d.train, 2, 0).batch(step, set(later.unreadable)) for d in (whole, later))
        assert before == now and train[4] not in now


def test_too_many_bad_clips_are_listed_with_what_to_do(tmp_path, splits):
    train = questions(tmp_path, "train", 20, bad=set(range(12)))
    with pytest.raises(DataError) as caught:
        Dataset(train, splits[1])
    text = str(caught.value)
    assert "12 of 20 rows of data.train are bad" in text and text.count("silent:") == 10
    assert "raise data.max_bad_fraction" in text and "data.check" not in text  # that command reads manifests only
    good, bad = questions(tmp_path, "good", 30), questions(tmp_path, "eval", 5, bad={0})
    with pytest.raises(DataError, match=r"1 of 5 rows of data\.eval"):  # a large train hides nothing
        Dataset(good, bad, max_bad_fraction=0.1)


def test_row_problems_of_a_manifest_count(splits):
    train, held_out = splits
    problem = Problem("m.jsonl", 11, None, "bad_json", "not JSON")
    source = Manifest("m.jsonl", train, [problem], {q.id: i for i, q in enumerate(train, 1)})
    assert Dataset(source, held_out, max_bad_fraction=0.1).problems == [problem]
    with pytest.raises(DataError, match=r"1 of 11 rows.*\n  m.jsonl:11 - bad_json: not JSON\n.*data\.check m\.jsonl"):
        Dataset(source, held_out, max_bad_fraction=0.09)


def test_a_repeated_id_is_left_out(splits):
    train, held_out = splits
    dataset = Dataset([*train, train[0]], held_out, max_bad_fraction=0.1)
    assert dataset.train == train and dataset.problems[0].reason == "duplicate_id"


def test_an_empty_split_is_refused(tmp_path, splits):
    with pytest.raises(DataError, match=r"data\.eval .* no questions"):
        Dataset(splits[0], [])
    with pytest.raises(DataError, match=r"2 of 2 rows of data\.train"):
        Dataset(questions(tmp_path, "train", 2, bad={0, 1}), splits[1], max_bad_fraction=1.0)


def test_held_out_is_held_out(splits):
    train, held_out = splits
    with pytest.raises(DataError, match=r"'train2' is in data\.train and data\.eval"):
        Dataset(train, [*held_out, train[2]])
    copied = replace(train[2], id="other", start=0.0)  # 0 seconds is the same start as none
    with pytest.raises(DataError, match=r"clip of held-out question 'other'.*train2\.wav"):
        Dataset(train, [copied])
    Dataset(train[:1], [replace(train[0], id="rest", start=0.25)])  # another stretch of the same file


def test_silent_replaces_samples_but_still_checks_clips(tmp_path, splits):
    train, held_out = splits
    dataset = Dataset(train, held_out, audio="silent")
    clip = dataset.clip(train[0])
    assert clip.samples.shape == (8000,) and clip.samples.dtype == np.float32 and not clip.samples.any()
    with pytest.raises(DataError, match="silent"):
        Dataset(questions(tmp_path, "train", 5, bad={1}), held_out, audio="silent")


def test_fingerprint_sees_every_part_of_a_row_and_its_split(splits):
    train, held_out = splits

    def of(train, held_out=held_out):
        return Dataset(train, held_out, verify="none").fingerprint

    changes = [
        {"id": "x"}, {"question": "Who?"}, {"choices": ("a", "c")}, {"answer": 1}, {"start": 0.1}, {"end": 0.4},
        {"audio": train[0].audio.with_name("other.wav")},
    ]  # fmt: skip
    seen = {of(train), of(train[:-1], [train[-1], *held_out])}
    seen |= {of([replace(train[0], **change), *train[1:]]) for change in changes}
    assert len(seen) == 2 + len(changes)
    assert of(train) == of(list(train))


def test_wrong_settings(splits):
    for wrong in ({"audio": "loud"}, {"verify": "maybe"}):
        with pytest.raises(DataError, match="must be"):
            Dataset(*splits, **wrong)


def test_progress(splits):
    seen = []
    Dataset(*splits, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 10) for i in range(1, 11)] + [(i, 5) for i in range(1, 6)]
