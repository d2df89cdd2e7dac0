"""Accuracy: every way to name an option, every way to be wrong."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.accuracy import accuracy, choice, exact, named

PETS = ("cat", "dog", "a bird", "wild boar")
QUESTION = {"choices": PETS, "answer": 1}


def said(answer: str, thought: str = "hm") -> str:
    return f"<think>{thought}</think><semantic_elements>x</semantic_elements><answer>{answer}</answer>"


@pytest.mark.parametrize(
    "answer",
    ["(B) dog", "B. dog", "B) dog", "B: dog", "dog", "b", "B", "**B**", "Option B", "B.", "B!", "(b)", "[B]",
     "**B.** dog", "B - dog", "B.dog", "dog.", "DOG", '"dog"', "`B`", " B.\n dog ", "Option B: dog", "Answer: B",
     "choice (b) dog!", "**Option B**", "**dog.**", "**dog**.",
     "\uff22", "\uff08\uff22\uff09 \uff44\uff4f\uff47", "\u24b7"],
)  # fmt: skip
def test_ways_to_say_b_dog(answer):
    assert choice(answer, PETS) == 1


@pytest.mark.parametrize(
    "answer",
    [None, "", " ", "?", "**", "E", "E. dog", "A. dog", "(A) dog", "B. cat", "Option A: dog", "a dog", "B dog",
     "dogs", "cat or dog", "A or B", "AB", "the B", "B. dog or cat", "b" * 5000, "\u0130", "-B"],
)  # fmt: skip
def test_names_no_option(answer):
    assert choice(answer, PETS) is None


def test_article_and_letter_are_told_apart():
    assert choice("a bird", PETS) == 2
    assert choice("C. a bird", PETS) == 2
    assert choice("a", PETS) == 0
    assert choice("wild  BOAR", PETS) == 3


def test_choices_that_are_letters():
    assert choice("B", ("B", "A")) == 0  # its text, not its letter
    assert choice("b", ("B", "A")) == 0
    assert choice("**B**", ("B", "A")) == 0
    assert choice("A. B", ("B", "A")) == 0
    assert choice("B. A", ("B", "A")) == 1
    assert choice("B. B", ("B", "A")) is None  # letter and text contradict
    assert choice("B.", ("B", "A")) is None  # letter or text?
    assert choice("(B)", ("B", "A")) is None
    assert choice("Option B", ("B", "A")) is None
    assert choice("Option B!", ("Option B.", "x")) is None
    assert choice("B.", ("A", "B")) == 1  # both readings agree


def test_choices_that_begin_like_labels():
    species = ("B. subtilis", "E. coli")
    assert choice("B. subtilis", species) == 0
    assert choice("b. subtilis.", species) == 0
    assert choice("E. coli", species) == 1
    assert choice("B. E. coli", species) == 1
    assert choice("A. B. subtilis", species) == 0
    assert choice("A. E. coli", species) is None
    assert choice("B", species) == 1


def test_choices_that_differ_in_little():
    assert choice("US", ("Us", "US")) == 1
    assert choice("us", ("Us", "US")) is None
    assert choice("B. Us", ("Us", "US")) is None  # the text is that of A
    assert choice("dog", ("dog", "dog")) is None
    assert choice("B. dog", ("dog", "dog")) == 1
    assert choice("B. -5", ("-5", "5")) is None
    assert choice("A. -5", ("-5", "5")) == 0
    assert choice("B. .5", (".5", "5")) is None
    assert choice("C#", ("C", "C#", "C++")) == 1
    assert choice("", ("", "dog")) is None


def test_golden_accuracy():
    assert accuracy(said("B. dog"), **QUESTION) == 1.0
    assert accuracy(said("\nB. dog\n"), **QUESTION) == 1.0
    assert accuracy(said("B"), choices=PETS, answer=2) == 0.0


def test_wrong_letters_are_wrong():
    for gold in range(4):
        for letter in range(4):
            assert accuracy(said("ABCD"[letter]), choices=PETS, answer=gold) == float(letter == gold)


def test_only_answer_blocks_are_read():
    counts = {"choices": ("The dog barks 3 times", "rain", "The cat meows 3 times"), "answer": 2}
    assert accuracy(said("A. The dog barks 3 times", thought="3 meows"), **counts) == 0.0
    assert accuracy(said("B. rain", thought="C. The cat meows 3 times"), **counts) == 0.0
    assert accuracy("<think>B. dog</think>", **QUESTION) == 0.0
    assert accuracy("B. dog", **QUESTION) == 0.0
    assert accuracy("<answer>B. dog", **QUESTION) == 0.0
    assert accuracy("", **QUESTION) == 0.0


def test_two_answers():
    two = "<answer>{}</answer> or <answer>{}</answer>"
    assert accuracy(two.format("B", "A"), **QUESTION) == 0.0
    assert accuracy(two.format("A", "B"), **QUESTION) == 0.0
    assert accuracy(two.format("B", "no idea"), **QUESTION) == 0.0
    assert accuracy(two.format("B", "dog"), **QUESTION) == 1.0


@pytest.mark.parametrize("rule", [accuracy, exact])
@pytest.mark.parametrize("gold", [-1, 4])
def test_gold_out_of_range(rule, gold):
    with pytest.raises(ValueError, match="not the index"):
        rule("", choices=PETS, answer=gold)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (said("B. dog"), 1.0),
        (said("  B. dog "), 1.0),
        ("B. dog\n", 1.0),  # no tags: the whole completion
        (said("B"), 0.0),
        (said("b. dog"), 0.0),
        (said("B. dog."), 0.0),
        (said("\nB. dog\n"), 0.0),  # its dot stops at a line break
        ("<answer>B. dog</answer><answer>A. cat</answer>", 1.0),  # the first
        ("<answer>A. cat</answer><answer>B. dog</answer>", 0.0),
        (said("A. The dog barks 3 times", thought="3"), 0.0),  # no symbolic check
    ],
)
def test_golden_exact(completion, reward):
    assert exact(completion, **QUESTION) == reward


# ---------------------------------------------------------------- properties

words = st.text("abcdefgh", min_size=2, max_size=6)
options = st.lists(words, min_size=2, max_size=6, unique=True)


@given(options, st.data())
def test_letter_text_and_both_agree_whatever_case_and_space(choices, data):
    i = data.draw(st.integers(0, len(choices) - 1))
    letter = chr(ord("A") + i)
    space = data.draw(st.sampled_from(["", " ", "\n", "\u3000"]))
    text = choices[i]
    for answer in (letter, text, f"{letter}. {text}", f"({letter}){space}{text}", f"{letter}:{space}"):
        for same in (answer, answer.upper(), answer.lower(), space + answer + space, f"**{answer}**"):
            assert choice(same, choices) == i


@given(options, st.data())
def test_a_contradiction_names_both(choices, data):
    i, j = data.draw(st.permutations(range(len(choices))))[:2]
    text = f"{chr(ord('A') + i)}. {choices[j]}"
    assert named(text, choices) == {i, j} and choice(text, choices) is None


@given(st.text(), st.lists(st.text(), min_size=1, max_size=5))
def test_never_raises_and_stays_in_range(text, choices):
    assert choice(text, choices) in (None, *range(len(choices)))
    for completion in (text, f"<answer>{text}</answer>"):
        for rule in (accuracy, exact):
            assert rule(completion, choices=choices, answer=0) in (0.0, 1.0)


@given(st.text(min_size=1), st.text(min_size=1))
def test_an_option_names_itself(text, other):
    def same(a, b):
        return unicodedata.normalize("NFKC", a).split() == unicodedata.normalize("NFKC", b).split()

    if unicodedata.normalize("NFKC", text).split() and not same(text, other):
        assert choice(text, (other, text)) == 1
