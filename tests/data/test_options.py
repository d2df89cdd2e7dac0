"""Published options and answers as bare texts and an index."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.manifest import RowError
from data.options import bare, index, listed, within

texts = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("published", "wanted"),
    [
        (["A. dog", "B. cat"], ["dog", "cat"]),
        (["(A) dog", "(B) cat"], ["dog", "cat"]),
        (["A) dog", "B) cat"], ["dog", "cat"]),
        (["A: dog", "B: cat"], ["dog", "cat"]),
        (["A dog", "B flat"], ["A dog", "B flat"]),  # an article and a note
        (["A dog", "A cat"], ["A dog", "A cat"]),
        (["A. Vivaldi", "J. Bach"], ["A. Vivaldi", "J. Bach"]),
        (["A.M. radio", "B.B. King"], ["A.M. radio", "B.B. King"]),
        (["A. dog", "cat"], ["A. dog", "cat"]),
        (["B. dog", "A. cat"], ["B. dog", "A. cat"]),
    ],
)
def test_letters_go_only_where_every_option_has_its_own(published, wanted):
    assert bare(published) == wanted


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, min_size=2, max_size=8, unique=True), st.data())
def test_lettered_options_come_back_bare_and_the_answer_finds_its_index(options, data):
    lettered = [f"{a}. {text}" for a, text in zip("ABCDEFGH", options, strict=False)]
    answer = data.draw(st.integers(0, len(options) - 1))
    assert bare(lettered) == options
    assert listed(dict(zip("ABCDEFGH", options, strict=False))) == bare(options)
    assert index(options[answer], options) == answer
    assert within("What is it?\nChoices:\n" + "\n".join(lettered))[1] == options


@pytest.mark.parametrize("options", [["a", "C) b"], ["0", "00", "D."], ["x", "y z C. w", "q"]])
def test_within_a_line_a_letter_begins_no_option(options):
    lines = "\n".join(f"{a}. {text}" for a, text in zip("ABC", options, strict=False))
    assert within(f"What is it?\nChoices:\n{lines}") == ("What is it?", options)
    assert within(f"What is it?\n{lines}") == ("What is it?", options)


def test_answers_in_every_dress():
    options = ["dog", "A cat", "B"]
    assert [index(a, options) for a in (1, "A cat", "a cat.", "B. A cat", "(B) a cat", "A", "B")] == [
        1,
        1,
        1,
        1,
        1,
        0,
        2,
    ]
    for wrong in (3, -1, True, None, "", "B. dog", "cow", "D"):
        with pytest.raises(RowError):
            index(wrong, options)


def test_options_within_a_question():
    assert within("What? (A) a dog (B) A. B. Smith (C) rain") == ("What?", ["a dog", "A. B. Smith", "rain"])
    assert within("Who? Please choose the answer from the following options: ['x', 'y']") == ("Who?", ["x", "y"])
    assert within("Which options are there?\nChoices:\nA. one\nB. two") == ("Which options are there?", ["one", "two"])
    for text in ("What is it?", "A. only one", "x" * 30_000):
        with pytest.raises(RowError, match=r"options|characters"):
            within(text)


@pytest.mark.parametrize(
    "cell", ["{'A': 'dog', 'B': 'cat'}", '["dog", "cat"]', "A. dog\nB. cat", "dog|cat", "('dog', 'cat')"]
)
def test_a_cell_of_choices(cell):
    assert listed(cell) == ["dog", "cat"]


@pytest.mark.parametrize(
    "cell", ["(" * 5000, "[" * 100_000, "__import__('os').system('false')", "dog", 5, None, [["a"]], "9" * 10_000]
)
def test_a_hostile_cell_is_one_clear_error(cell):
    with pytest.raises(RowError):
        listed(cell)
