"""The exact text that the model sees."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

import data
from data.prompt import Prompt
from data.question import Question

CONF = Path(data.__file__).parents[1] / "conf" / "prompt"
QUESTION = Question("a", Path("/a.wav"), "What barks?", ("dog", "the rain", "A. Smith"), 0)
LINES = "What barks?\nChoices:\nA. dog\nB. the rain\nC. A. Smith"
SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)


def from_yaml(name):
    cfg = OmegaConf.merge({"think_words": 25}, {"prompt": OmegaConf.load(CONF / f"{name}.yaml")}).prompt
    cfg = OmegaConf.to_container(cfg, resolve=True)
    assert cfg.pop("_target_") == "data.prompt.Prompt"
    return Prompt(**cfg)


def test_messages():
    text = [{"type": "audio"}, {"type": "text", "text": "Listen. " + LINES}]
    assert Prompt(None, "Listen. ").messages(QUESTION) == [{"role": "user", "content": text}]
    assert Prompt("Be.", "Listen. ").messages(QUESTION) == [
        {"role": "system", "content": [{"type": "text", "text": "Be."}]},
        {"role": "user", "content": text},
    ]


def test_audsem():
    prompt = from_yaml("audsem")
    assert prompt.system == SYSTEM
    assert prompt.text(QUESTION) == (
        "You are given a question and an audio clip. Your task is to answer the question based on the audio clip. The "
        "answers are multiple choice, so you need to select the correct answer from the given options. First, think "
        "about the question and the audio clip and put your thoughts in <think> and </think> tags. Your thinking "
        "process should be approximately 25 words long. Then reason about the semantic elements involved in the audio "
        "clip and put your reasoning in <semantic_elements> and </semantic_elements> tags. Then answer the question "
        "based on the audio clip, put your answer in <answer> and </answer> tags. Question: " + LINES
    )


def test_card():
    prompt = from_yaml("card")
    assert prompt.system == SYSTEM
    assert prompt.text(QUESTION) == (
        "You are given a question and an audio clip. Your task is to answer the question based on the audio clip. "
        "First, think about the question and the audio clip and put your thoughts in <think> and </think> tags. Then "
        "reason about the semantic elements involved in the audio clip and put your reasoning in <semantic_elements> "
        "and </semantic_elements> tags. Then answer the question based on the audio clip, put your answer in <answer> "
        "and </answer> tags.\nQuestion: What barks? (A) dog (B) the rain (C) A. Smith"
    )


def test_short():
    assert from_yaml("short").text(QUESTION) == "Listen. " + LINES


def test_braces_of_the_question_are_left_alone():
    question = Question("a", Path("/a.wav"), "Is {words} said?", ("{x}", "b"), 0)
    assert Prompt(None, "In {words} words: ", words=5).text(question).startswith("In 5 words: Is {words} said?")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"instruction": "{words} words"}, "nothing fills.*set prompt.words"),
        ({"instruction": "{args.target_length} words", "words": 25}, "args.target_length"),
        ({"instruction": "x", "system": "{name}"}, "name"),
        ({"instruction": "x", "options": "table"}, "prompt.options"),
    ],
)
def test_a_prompt_that_nothing_fills(given, message):
    with pytest.raises(ValueError, match=message):
        Prompt(**{"system": None} | given)


def test_letters_end_at_z():
    choices = [f"n{i}" for i in range(27)]
    assert Prompt(None, "").text(Question("a", None, "?", tuple(choices[:26]), 0)).endswith("\nZ. n25")
    with pytest.raises(ValueError, match="27 options"):
        Prompt(None, "").text(Question("a", None, "?", tuple(choices), 0))
