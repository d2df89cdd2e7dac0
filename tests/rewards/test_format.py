"""Format: one shape pays, everything beside it does not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.format import format, published
from rewards.tags import TAGS
from tests.rewards.test_tags import soup

T, S, A = "<think>a</think>", "<semantic_elements>b</semantic_elements>", "<answer>c</answer>"


@pytest.mark.parametrize("text", [T + S + A, f"{T}\n{S}\n{A}", f" \n{T}  {S}\n\n{A}\n", f"<think>a\nb</think>{S}{A}"])
def test_well_formed(text):
    assert format(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "B. dog", T, T + A, S + A, T + S, A + S + T, S + T + A,  # missing, out of order
        T + T + S + A, T + S + A + A, T + S + A + T,  # twice
        "x" + T + S + A, T + "x" + S + A, T + S + A + "x",  # text outside
        f"<think>{S}</think>{A}", f"<think>a{S}{A}</think>", f"<think>a<think>b</think></think>{S}{A}",  # nested
        f"<think>a{S}{A}", f"{T}{S}<answer>c", f"</think>a<think>{S}{A}",  # not closed
        f"<think></think>{S}{A}", f"<think> \n</think>{S}{A}", f"{T}{S}<answer></answer>",  # empty
        f"{T}<semantic_elements></semantic_elements>{A}",
        f"<think>why </answer>?</think>{S}{A}", f"<Think>a</Think>{S}{A}",
    ],
)  # fmt: skip
def test_not_well_formed(text):
    assert format(text) == 0.0


def test_two_blocks():
    two = ("think", "answer")
    assert format(T + A, tags=two) == 1.0
    assert format(T + S + A, tags=two) == 0.0  # a known tag is never plain text
    assert format(f"<think>{S}</think>{A}", tags=two) == 0.0
    assert format(T + S + A, tags=list(TAGS)) == 1.0


@pytest.mark.parametrize(
    ("text", "three", "two"),
    [
        (f"{T}\n{S}\n{A}", 0.5, 0.0),  # a semantic block when there should be none
        (f"{T}\n{A}", 0.0, 0.5),
        ("<think></think><semantic_elements></semantic_elements><answer></answer>", 0.5, 0.0),  # empty blocks
        (f"<think>{T}</think>{S}{A}", 0.5, 0.0),  # nested tags
        (f" {T}{S}{A}", 0.0, 0.0),
        (f"{T}{S}{A}\n", 0.0, 0.0),
        (f"{T}{S}{A} x", 0.0, 0.0),
        (f"{T} x {S}{A}", 0.0, 0.0),
        ("<think></semantic_elements><answer></think><semantic_elements></answer>", 0.0, 0.0),  # joints in wrong order
    ],
)
def test_golden_published(text, three, two):
    assert published(text) == three
    assert published(text, semantic=False) == two


@given(soup)
def test_published_is_the_published_pattern(text):
    three = r"<think>.*?</think>\s*<semantic_elements>.*?</semantic_elements>\s*<answer>.*?</answer>"
    two = r"<think>.*?</think>\s*<answer>.*?</answer>"
    for whole in (text, T + text + S + text + A, f"<think>{text}</answer>", T + text + A):
        assert published(whole) == 0.5 * bool(re.fullmatch(three, whole, re.S))
        assert published(whole, semantic=False) == 0.5 * bool(re.fullmatch(two, whole, re.S))


@given(soup | st.text())
def test_never_raises_and_well_formed_implies_published(text):
    assert format(text) in (0.0, 1.0)
    assert format(T + text + S + A) in (0.0, 1.0)
    if format(text) == 1.0:
        assert published(text.strip()) == 0.5


@given(*[st.text("ab \n.", min_size=1).filter(str.strip)] * 3)
def test_any_plain_contents_pay(a, b, c):
    assert format(f"<think>{a}</think><semantic_elements>{b}</semantic_elements><answer>{c}</answer>") == 1.0
