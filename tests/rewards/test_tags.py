"""Tags: what counts as a block, and that no text is too strange or too long."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.tags import TAGS, parse, published_block

PIECES = [*(f"<{name}>" for name in TAGS), *(f"</{name}>" for name in TAGS), "a", " ", "\n", "<"]
soup = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def test_three_blocks():
    text = "<think>a dog\nbarks</think>\n<semantic_elements> bark </semantic_elements>\n<answer>\nB. dog\n</answer>\n"
    tags = parse(text)
    assert (tags.think, tags.semantic_elements, tags.answer) == ("a dog\nbarks", "bark", "B. dog")
    assert tags.well_formed
    assert tags.opened == tags.closed == {"think": 1, "semantic_elements": 1, "answer": 1}


@pytest.mark.parametrize(
    ("text", "think", "answers"),
    [
        ("", None, ()),
        ("<answer>A</answer><answer>B</answer>", None, ("A", "B")),
        ("<think>a", None, ()),  # unclosed
        ("a</think><answer>B</answer>", None, ("B",)),  # stray closing tag
        ("<think>a<answer>B</answer>", None, ("B",)),
        ("<think>a<answer>B</answer></think>", None, ("B",)),  # nested: the inner counts
        ("<think><think>a</think></think>", "a", ()),
        ("<answer>A<answer>B</answer>", None, ("B",)),
        ("<Think>a</Think><answer >B</answer>", None, ()),  # not tags
        ("</answer>B<answer>", None, ()),
        ("<think></think>", "", ()),
    ],
)
def test_blocks_of_odd_texts(text, think, answers):
    tags = parse(text)
    assert tags.think == think
    assert tags.blocks["answer"] == answers
    assert tags.answer == (answers[0] if answers else None)
    assert not tags.well_formed


def test_counts():
    tags = parse("<think><think>a</think></answer>")
    assert tags.opened == {"think": 2, "semantic_elements": 0, "answer": 0}
    assert tags.closed == {"think": 1, "semantic_elements": 0, "answer": 1}


def test_other_names():
    tags = parse("<thinking>a</thinking><answer>B</answer>", tags=["thinking", "answer"])
    assert tags.well_formed
    assert tags.blocks["thinking"] == ("a",)


@pytest.mark.parametrize("names", [(), "think"])
def test_names_must_be_a_list(names):
    with pytest.raises(ValueError, match="tags must be a list"):
        parse("", tags=names)


@given(soup)
def test_contents_hold_no_tag_and_counts_are_plain_counts(text):
    tags = parse(text)
    no_tag = f"(?:(?!</?(?:{'|'.join(TAGS)})>).)*"
    for name in TAGS:
        assert tags.opened[name] == text.count(f"<{name}>")
        assert tags.closed[name] == text.count(f"</{name}>")
        assert len(tags.blocks[name]) == len(re.findall(f"<{name}>{no_tag}</{name}>", text, re.S))
        assert all(content == content.strip() for content in tags.blocks[name])


@given(st.text() | soup)
def test_any_text_can_be_parsed(text):
    assert parse(text).well_formed in (True, False)


def test_published_block_ends_at_a_line_feed_only():
    assert published_block("<answer>B\rdog</answer>", "answer") == "B\rdog"
    assert published_block("<answer>B\ndog</answer>", "answer") is None


@given(soup | st.text())
def test_published_block_is_the_published_pattern(text):
    for name in ("think", "answer"):
        found = re.search(f"<{name}>(.*?)</{name}>", text)
        assert published_block(text, name) == (found.group(1).strip() if found else None)
