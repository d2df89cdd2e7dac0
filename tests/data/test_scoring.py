"""The published rules, clause by clause."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.scoring import RULES, official
from grpo.predict import read
from tests.conftest import make_question

CHOICES = ("A dog barks", "A cat meows", "Rain")

words = st.sampled_from(["a", "dog", "cat", "the", "3", "C#", "Ünder", "雨", "don't", "!", "_x"])
texts = st.lists(words, min_size=1, max_size=4).map(" ".join)
items = st.lists(texts, min_size=2, max_size=5).flatmap(lambda c: st.tuples(st.just(c), st.integers(0, len(c) - 1)))


def mmau(prediction, choices=CHOICES, answer=0):
    return official(prediction, choices, answer, "mmau_mini")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("A dog barks", True),
        ("barks, a DOG!", True),  # order, case and punctuation vanish
        ("I think a dog barks loudly", True),  # extra words of no option
        ("dog barks", False),  # a word of the gold is missing
        ("A dog barks and a cat", False),  # a word of a wrong option
        ("A dog barks in the rain", False),
        ("", False),
        ("...", False),  # punctuation is no word
        ("A", False),
    ],
)
def test_containment_and_exclusion(prediction, right):
    assert mmau(prediction) is right


def test_the_letter_that_is_a_word():
    """gold "Dog": "A. Dog" fails since "a" is a word of a wrong option; without such an option it passes."""
    assert not mmau("A. Dog", ("Dog", "A cat"), 0)
    assert mmau("A. Dog", ("Dog", "Cat"), 0)


def test_options_of_the_same_words_are_one_to_the_rule():
    assert mmau("bites dog man", ("Man bites dog", "Dog bites man"), 0)
    assert mmau("C", ("C#", "C", "D"), 0)  # signs are no words: {c} = {c}
    assert not mmau("D", ("C#", "C", "D"), 0)


def test_unicode_words():
    assert mmau("ÜBER die brücke", ("Über die Brücke", "Unter der Brücke"), 0)
    assert mmau("雨声", ("雨声", "风声"), 0)
    assert not mmau("brucke", ("Brücke", "Fluss"), 0)  # no folding of accents
    assert mmau("1.5", ("5 1", "2"), 0)  # 1.5 is the words 1 and 5


@settings(max_examples=200, deadline=None)
@given(items, texts)
def test_the_rule_is_a_rule_on_sets(item, prediction):
    """Doubling and reversing the prediction changes nothing; the gold's own text is right unless it has no words;
    adding the words of an option that has others makes it wrong."""
    choices, answer = item
    verdict = mmau(prediction, choices, answer)
    assert mmau(" ".join(reversed((prediction + " " + prediction).split())), choices, answer) == verdict
    gold = choices[answer]
    has_words = any(c.isalnum() or c == "_" for c in gold)
    assert mmau(gold, choices, answer) == has_words
    for other in choices:
        mine, theirs = set(gold.lower().split()), set(other.lower().split())
        if all(w.isalnum() for w in mine | theirs) and theirs - mine:
            assert not mmau(f"{gold} {other}", choices, answer)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("B", True),
        ("B. Rain", True),
        ("The answer is B.", True),
        ("\nB\n", True),
        ("A", False),
        ("Bus", True),
        ("the answer is B", False),
        ("", False),
        ("None", False),
        ("b", False),
        ("x", False),
    ],
)
@pytest.mark.parametrize("benchmark", ["mmsu", "air_bench"])
def test_first_or_second_to_last_letter(benchmark, prediction, right):
    assert official(prediction, ("Dog", "Rain", "Bell", "Wind"), 1, benchmark) is right


def test_mmsu_takes_any_option_with_the_golds_text_and_air_bench_the_first():
    choices = ("Rain", "Dog", "Rain", "Bell")
    assert official("C", choices, 0, "mmsu") and not official("C", choices, 0, "air_bench")
    assert not official("D", ("Rain", "Dog"), 1, "mmsu")  # a letter behind the last option


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("(B) jazz", True),
        ("The correct answer is: B", True),
        ("A no. The correct answer is: (B)", True),
        ("jazz", True),
        ("it is jazz or rock", False),
        ("A or B", False),
        ("", False),
        ("Drums and jazz", False),
    ],
)
def test_muchomusic(prediction, right):
    assert official(prediction, ("rock", "jazz", "pop", "folk"), 1, "muchomusic") is right


def test_dcase_compares_whole_texts():
    assert all(official(p, CHOICES, 2, "dcase2025") for p in ("Rain", " C. Rain"))
    assert not any(official(p, CHOICES, 2, "dcase2026") for p in ("rain", "B. Rain", "C", ""))


def test_unknown_names_and_golds_are_refused():
    with pytest.raises(ValueError, match="no published rule for benchmark 'mmlu'"):
        official("x", CHOICES, 0, "mmlu")
    for answer in (-1, 3, True, None):
        with pytest.raises(ValueError, match="is not the index"):
            official("x", CHOICES, answer, "mmar")


STYLES = {"text": "{t}", "letter and text": "{a}. {t}", "sentence": "The answer is {t}.", "letter": "{a}"}


def right_of_a_perfect_model(benchmark, rule):
    """For each style the number of five questions that a perfect model gets, worked out by hand:

    1 (dog | a cat | rain), gold 1     text ok; "A. dog" says "a", a word of "a cat"; the sentence ok; the letter never
    2 (rain | dog), gold 2             text; "B. dog"; sentence ok
    3 (the sea | the answer), gold 1   text; "A. the sea"; the sentence says "answer", a word of the wrong option
    4 (is | was), gold 1               text; "A. is"; sentence ok
    5 (C | A | B minor), gold 1        text; "A. C" says "a"; the sentence ok; the letter A is the wrong option's text
    """
    questions = [
        (("dog", "a cat", "rain"), 0),
        (("rain", "dog"), 1),
        (("the sea", "the answer"), 0),
        (("is", "was"), 0),
        (("C", "A", "B minor"), 0),
    ]
    return [sum(rule(style.format(t=c[g], a="ABC"[g]), c, g) for c, g in questions) for style in STYLES.values()]


def test_what_a_perfect_model_scores_by_style():
    assert right_of_a_perfect_model("mmau_mini", lambda p, c, g: official(p, c, g, "mmau_mini")) == [5, 3, 4, 0]

    def strict(prediction, choices, gold):
        return read(make_question("q", choices=choices, answer=gold), f"<answer>{prediction}</answer>").right

    assert right_of_a_perfect_model("mmau_mini", strict) == [5, 5, 0, 4]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.sampled_from(sorted(RULES)))
def test_any_text_gets_a_verdict(text, benchmark):
    assert official(text, CHOICES, 1, benchmark) in (True, False)
