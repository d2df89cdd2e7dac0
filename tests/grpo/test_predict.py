"""Answers: how a completion is read, that every question gets one, and that ranks and batches change nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from data.audio import ClipError
from grpo.batch import Completion, Encoded, Group
from grpo.predict import STATES, heldout_accuracy, predict, prompt_hash, read, spread
from grpo.rollout import Sampling
from rewards.accuracy import accuracy
from tests.conftest import CHOICES, OneRank, make_question

RIGHT = {0, 1, 4}  # of 5 questions
QUESTIONS = [make_question(str(i)) for i in range(5)]


class Rollout:
    """Answers with the gold option where RIGHT says so; remembers how it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, copies, sampling):
        self.asked.append((len(prompts), copies, sampling.greedy, sampling.max_tokens))
        texts = ["<answer>rain</answer>" if int(p.id) in RIGHT else "<answer>dog</answer>" for p in prompts]
        return [Group(p, (Completion((1,), (0.0,), t, False, 0),)) for p, t in zip(prompts, texts, strict=True)]


def encode(question):
    return Encoded(question.id, [0, 0], None, "sha")


@pytest.mark.parametrize(
    ("text", "state", "choice"),
    [
        ("<answer>rain</answer>", "ok", 1),
        ("<answer>B</answer>", "ok", 1),
        ("<answer>B. rain</answer>", "ok", 1),
        ("<answer>dog</answer>", "ok", 0),
        ("rain", "no tag", None),
        ("<answer>rain", "no tag", None),
        ("<answer>cat</answer>", "not a choice", None),
        ("<answer></answer>", "not a choice", None),
        ("<answer>A. rain</answer>", "ambiguous", None),
        ("<answer>dog or rain</answer>", "not a choice", None),
        ("<answer>dog</answer><answer>rain</answer>", "ambiguous", None),
        ("<answer>rain</answer><answer>B</answer>", "ok", 1),
    ],
)
def test_states(text, state, choice):
    answer = read(make_question("q"), text)
    assert (answer.state, answer.choice) == (state, choice) and state in STATES
    assert answer.right == bool(accuracy(text, choices=CHOICES, answer=1))  # the rule that was rewarded


def test_an_option_printed_twice_is_one():
    twice, case = make_question("q", choices=("dog", "rain", "dog"), answer=2), make_question("q", choices=("US", "us"))
    assert all(read(twice, f"<answer>{text}</answer>").right for text in ("dog", "A", "C. dog"))
    assert read(case, "<answer>us</answer>").right and read(case, "<answer>Us</answer>").state == "ambiguous"


def test_a_cut_answer_is_told_from_one_without_tags():
    assert read(make_question("q"), "<think>and so on", truncated=True).state == "truncated"
    assert read(make_question("q"), "<answer>rain</answer> and", truncated=True).state == "ok"


@pytest.mark.parametrize(
    ("text", "bare"), [("<answer>B. rain</answer>", "rain"), ("<answer>cat</answer>", "cat"), ("cat", "")]
)
def test_official_scorers_get_the_bare_option(text, bare):
    assert read(make_question("q"), text).bare == bare


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_every_question_counts_whatever_the_batch(batch):
    rollout = Rollout()
    share = heldout_accuracy(QUESTIONS, encode, rollout, OneRank(), stand_in=encode, max_tokens=9, batch=batch)
    assert share == 3 / 5 and sum(n for n, *_ in rollout.asked) == 5 and max(n for n, *_ in rollout.asked) <= batch
    assert all(a[1:] == (1, True, 9) for a in rollout.asked)


def test_ranks_share_the_questions_and_agree():
    def measure(rank, elsewhere):
        engine = SimpleNamespace(
            rank=rank, world=2, together=lambda call, error: call(), reduce=lambda v: {"right": v["right"] + elsewhere}
        )
        return heldout_accuracy(QUESTIONS, encode, Rollout(), engine, stand_in=encode, max_tokens=9)

    assert measure(0, 1.0) == measure(1, 2.0) == 3 / 5  # 0, 2, 4 here and 1, 3 there


def test_all_ranks_ask_equally_often():
    asked = []
    for rank in range(7):  # more than there are questions
        engine = SimpleNamespace(rank=rank, world=7, together=lambda call, error: call(), reduce=dict)
        rollout = Rollout()
        heldout_accuracy(QUESTIONS, encode, rollout, engine, stand_in=encode, max_tokens=9, batch=1)
        asked.append(len(rollout.asked))
    assert asked == [1] * 7


def test_what_cannot_be_heard_is_wrong_and_stays():
    def broken(question):
        if question.id in "03":
            raise ClipError("missing", Path("x.wav"), "no such file")
        return encode(question)

    answers = list(predict(QUESTIONS, broken, Rollout(), sampling=Sampling(9, greedy=True), batch=2))
    assert [a.question.id for a in answers] == list("01234")
    assert [a.state for a in answers] == ["audio error", "ok", "ok", "audio error", "ok"]
    assert answers[0].problem == "missing: x.wav: no such file" and not answers[0].right
    rollout = Rollout()
    assert heldout_accuracy(QUESTIONS, broken, rollout, OneRank(), stand_in=encode, max_tokens=9, batch=1) == 2 / 5
    assert len(rollout.asked) == 5  # as often as a rank that hears everything


def test_a_slice_is_spread_evenly():
    assert spread(range(10), 5) == [0, 2, 4, 6, 8] and spread(range(3), 5) == spread(range(3), None) == [0, 1, 2]


def test_the_prompts_hash_sees_the_prompt(policy):
    first = prompt_hash(policy)
    policy.prompt.instruction = "Listen closely."
    assert len(first) == 12 and prompt_hash(policy) != first


def test_a_prompt_without_audio(policy):
    from grpo.rollout.hf import HFRollout
    from tests.conftest import make_clip

    q, audio = make_question("q"), policy.thinker.config.audio_token_id
    heard, unheard = policy.encode(q, make_clip(0)), policy.encode(q, None)
    assert int((heard.prompt_ids == audio).sum()) > 0 == int((unheard.prompt_ids == audio).sum())
    together = HFRollout(policy).generate([heard, unheard], 1, Sampling(6, greedy=True))
    alone = HFRollout(policy).generate([unheard], 1, Sampling(6, greedy=True))
    assert together[1].completions[0].token_ids == alone[0].completions[0].token_ids
