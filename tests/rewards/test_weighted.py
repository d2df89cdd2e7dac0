"""The weighted sum: what is checked before a run, and that no failure passes for a reward of 0."""

import math
from functools import partial

import pytest

from rewards.accuracy import accuracy, exact
from rewards.format import format
from rewards.length import length
from rewards.overlong import overlong
from rewards.weighted import CONTEXT, Failure, RewardError, WeightedRewards

CONTEXT_OF_B = {"answer": 1, "choices": ("cat", "dog"), "question": "Which?", "n_tokens": 30, "truncated": False}
PERFECT = f"<think>{'word ' * 22}</think><semantic_elements>bark</semantic_elements><answer>B. dog</answer>"


def of(**functions) -> WeightedRewards:
    return WeightedRewards({name: {"weight": 1.0, "function": f} for name, f in functions.items()}, seconds=None)


def three() -> WeightedRewards:
    return WeightedRewards({
        "accuracy": {"weight": 1, "function": accuracy},
        "format": {"weight": 0.5, "function": format},
        "length": {"weight": 0.25, "function": partial(length, target=25, alpha=0.1, delta=0.5)},
    })  # fmt: skip


def test_golden_sum():
    # perfect: 1 * 1 + 0.5 * 1 + 0.25 * 1 = 1.75. "B" alone: nothing. 18 words, no answer: 0.25 * 0.8 = 0.2
    short = f"<think>{'word ' * 18}</think>"
    scores = three().score([PERFECT, "B", short], contexts=[CONTEXT_OF_B] * 3)
    assert scores.components[:2] == [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    assert scores.total == pytest.approx([1.75, 0.0, 0.2], abs=1e-6)
    assert scores.failures == []


def test_names_and_weights_keep_their_order():
    assert three().names == ("accuracy", "format", "length")
    assert three().weights == (1.0, 0.5, 0.25)


def test_each_completion_meets_its_own_context():
    rewards = of(accuracy=accuracy)
    scores = rewards.score([PERFECT] * 2, contexts=[CONTEXT_OF_B, CONTEXT_OF_B | {"answer": 0}])
    assert scores.total == [1.0, 0.0]


def test_a_function_gets_what_it_names():
    def all_of_it(completion, **context):
        assert context == CONTEXT_OF_B
        return 1.0

    def one(completion, *, truncated, n_tokens=0):
        return n_tokens + truncated

    assert of(a=all_of_it, b=one).score(["x"], contexts=[CONTEXT_OF_B]).components == [[1.0, 30.0]]


def test_nothing_to_score():
    scores = three().score([], contexts=[])
    assert (scores.components, scores.total, scores.failures) == ([], [], [])


def test_as_many_contexts_as_completions():
    with pytest.raises(ValueError, match="shorter"):
        three().score(["a", "b"], contexts=[CONTEXT_OF_B])


def test_a_context_without_a_wanted_key():
    with pytest.raises(ValueError, match=r"contexts\[0\] lacks 'choices', which the reward 'accuracy'"):
        three().score(["a"], contexts=[{"answer": 1}])


# ---------------------------------------------------------------- failures


def moody(completion):
    if completion == "raise":
        raise KeyError("no such sound")
    return {"nan": math.nan, "inf": math.inf, "none": None, "text": "1"}.get(completion, 0.5)


@pytest.mark.parametrize(
    ("completion", "error"),
    [("raise", "KeyError: 'no such sound'"), ("nan", "nan"), ("inf", "inf"), ("none", "None"), ("text", "got '1'")],
)
def test_a_failure_is_nan_and_counted_never_zero(completion, error):
    scores = of(moody=moody, format=format).score(["fine"] * 9 + [completion], contexts=[CONTEXT_OF_B] * 10)
    assert scores.components[:9] == [[0.5, 0.0]] * 9
    assert scores.total[:9] == [0.5] * 9
    assert math.isnan(scores.components[9][0])
    assert scores.components[9][1] == 0.0  # the other component stands
    assert math.isnan(scores.total[9])
    (failure,) = scores.failures
    assert (failure.index, failure.component) == (9, "moody")
    assert error in failure.error


def test_past_the_threshold_a_step_raises():
    rewards, lines = of(moody=moody), ["completion 8, moody: KeyError", "completion 9"]
    with pytest.raises(RewardError) as error:
        rewards.check(lines, 10)
    for part in ("2 of 10", *lines, "~rewards.components"):
        assert part in str(error.value)
    rewards.check(lines, 20)


def test_every_failed_component_is_told():
    assert of(a=moody, b=moody).score(["raise"] + ["x"] * 9, contexts=[{}] * 10).failures == [
        Failure(0, "a", "KeyError: 'no such sound'"),
        Failure(0, "b", "KeyError: 'no such sound'"),
    ]


def test_weight_zero_still_shows_its_failures():
    rewards = WeightedRewards({"moody": {"weight": 0, "function": moody}}, max_failed=1)
    assert math.isnan(rewards.score(["raise"], contexts=[{}]).total[0])


# ---------------------------------------------------------------- checks at the start


def lacking(completion, *, loudness):
    return 0.0


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lacking, "loudness"),
        (overlong, "max_tokens"),  # a hyper-parameter without default
        (partial(length, targett=3), "targett"),
        (partial(accuracy, answer=1), "'answer' comes from the context"),
        (lambda: 0.0, "too many positional"),
    ],
)
def test_signatures_are_checked_at_the_start(function, told):
    with pytest.raises(ValueError) as error:
        of(mine=function)
    name = getattr(function, "func", function).__name__
    for part in ("components.mine", name, told, *CONTEXT):
        assert part in str(error.value)


@pytest.mark.parametrize("weight", [math.nan, math.inf, None, "1", True])
def test_weights_are_finite_numbers(weight):
    with pytest.raises(ValueError, match=r"components\.a\.weight must be a finite number"):
        WeightedRewards({"a": {"weight": weight, "function": format}})


def test_other_mistakes():
    with pytest.raises(ValueError, match="at least one"):
        WeightedRewards({})
    with pytest.raises(ValueError, match=r"components\.a must be \{weight"):
        WeightedRewards({"a": {"wieght": 1, "function": format}})
    with pytest.raises(ValueError, match=r"components\.a must be"):
        WeightedRewards({"a": None})
    with pytest.raises(ValueError, match="_partial_: true"):
        WeightedRewards({"a": {"weight": 1, "function": 0.0}})
    with pytest.raises(ValueError, match="max_failed"):
        WeightedRewards({"a": {"weight": 1, "function": format}}, max_failed=10)


def test_describe():
    assert three().describe() == "1 accuracy + 0.5 format + 0.25 length(target=25, alpha=0.1, delta=0.5)"
    rewards = WeightedRewards({
        "accuracy": {"weight": -1, "function": exact},
        "overlong": {"weight": -0.5, "function": partial(partial(overlong, max_tokens=9), cache=3)},
    })  # fmt: skip
    assert rewards.describe() == "-1 accuracy:exact - 0.5 overlong(max_tokens=9, cache=3)"
