"""Length: the published table, and which words are counted. Overlong: DAPO's three pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.length import length, length_if_correct, published, value
from rewards.overlong import overlong
from tests.rewards.test_tags import soup

# t = 25, alpha = 0.1, delta = 0.5. Encouraged, n = 18: 1 - 0.1 * 7 + 0.5 = 0.8; n = 26: 0.1 * -1 + 0.5 = 0.4.
# Not encouraged, n = 22: 0.1 * 3 + 0.5 = 0.8.
N = (0, 5, 10, 11, 12, 15, 18, 20, 22, 25, 26, 27, 28, 29, 30, 31, 1000)
ON = (0, 0, 0, 0.1, 0.2, 0.5, 0.8, 1, 1, 1, 0.4, 0.3, 0.2, 0.1, 0, 0, 0)
OFF = (1, 1, 1, 1, 1, 1, 1, 1, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0)


def thought(n: int, space: str = " ") -> str:
    return f"<think>{space.join(['word'] * n)}</think><answer>B</answer>"


@pytest.mark.parametrize(("n", "on", "off"), list(zip(N, ON, OFF, strict=True)))
def test_golden_table(n, on, off):
    for rule in (length, published):
        assert rule(thought(n), target=25, alpha=0.1, delta=0.5, encourage=True) == pytest.approx(on, abs=1e-6)
        assert rule(thought(n), target=25, alpha=0.1, delta=0.5, encourage=False) == pytest.approx(off, abs=1e-6)


def test_defaults():
    assert length(thought(18)) == pytest.approx(0.8, abs=1e-6)
    assert published(thought(102)) == pytest.approx(0.3, abs=1e-6)  # 0.1 * (100 - 102) + 0.5


def test_hyper_parameters():
    # t = 10, alpha = 0.05, delta = 0.2: n = 4 gives 1 - 0.05 * 6 + 0.2 = 0.9; n = 12 gives 0.05 * -2 + 0.2 = 0.1
    assert value(4, 10, 0.05, 0.2, True) == pytest.approx(0.9, abs=1e-6)
    assert value(12, 10, 0.05, 0.2, True) == pytest.approx(0.1, abs=1e-6)


def test_words_over_several_lines_are_counted():
    assert length(thought(18, "\n")) == pytest.approx(0.8, abs=1e-6)
    assert length(thought(18, " \t\n ")) == pytest.approx(0.8, abs=1e-6)
    # the published count does not see that block: 18 words, glued to the tags, of the whole completion
    assert published(thought(12, "\n") + " x" * 6, target=25, encourage=True) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(
    "text",
    ["word " * 22, "<think>" + "word " * 22, "word " * 22 + "</think>", thought(22) + thought(22), "",
     "<think>" + "word " * 22 + "<answer>B</answer></think>"],
)  # fmt: skip
def test_no_thought_no_reward(text):
    assert length(text) == 0.0
    assert length(text, encourage=False) == 0.0


def test_published_counts_the_whole_completion_without_a_thought():
    assert published("word " * 22, target=25, encourage=True) == 1.0


def test_length_if_correct():
    pets = {"choices": ("cat", "dog")}
    assert length_if_correct(thought(18), **pets, answer=1) == pytest.approx(0.8, abs=1e-6)
    assert length_if_correct(thought(18), **pets, answer=0) == 0.0
    # L1's own form: 0.1 * (25 - 22) + 0.5 = 0.8; and other numbers arrive: 0.05 * (20 - 22) + 0.2 = 0.1
    assert length_if_correct(thought(22), **pets, answer=1, encourage=False) == pytest.approx(0.8, abs=1e-6)
    other = {"target": 20, "alpha": 0.05, "delta": 0.2}
    assert length_if_correct(thought(22), **pets, answer=1, **other) == pytest.approx(0.1, abs=1e-6)


@given(soup | st.text(), st.integers(0, 200), st.floats(0, 10), st.floats(0, 1), st.booleans())
def test_never_raises_and_stays_in_range(text, target, alpha, delta, encourage):
    hyper = {"target": target, "alpha": alpha, "delta": delta, "encourage": encourage}
    for completion in (text, f"<think>{text}</think>"):
        assert 0.0 <= length(completion, **hyper) <= 1.0
        assert 0.0 <= published(completion, **hyper) <= 1.0
        assert 0.0 <= length_if_correct(completion, choices=("a", "b"), answer=0, **hyper) <= 1.0


# ---------------------------------------------------------------- overlong


def test_golden_overlong():
    # M = 100, C = 20: free to 80, then (80 - n) / 20
    golden = {0: 0.0, 79: 0.0, 80: 0.0, 81: -0.05, 85: -0.25, 90: -0.5, 100: -1.0, 101: -1.0, 10_000: -1.0}
    for n, reward in golden.items():
        assert overlong("", n_tokens=n, max_tokens=100, cache=20) == pytest.approx(reward, abs=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 5000), st.data())
def test_overlong_range_and_order(n, max_tokens, data):
    cache = data.draw(st.integers(1, max_tokens))
    here, next_one = (overlong("", n_tokens=m, max_tokens=max_tokens, cache=cache) for m in (n, n + 1))
    assert -1.0 <= next_one <= here <= 0.0


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_overlong_cache_must_fit(cache):
    with pytest.raises(ValueError, match="cache"):
        overlong("", n_tokens=5, max_tokens=100, cache=cache)
