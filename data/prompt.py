"""The one prompt: used by training, evaluation and warm start alike."""

from __future__ import annotations

import re
from string import ascii_uppercase

from data.question import Question


class Prompt:
    """Chat messages for a question: an optional system turn, then a user turn with the audio first and the text second.

    Args:
        system: text of the system turn, or null for none.
        instruction: stands before the question; `{words}` is replaced by `words`.
        words: the thought's word budget.
        options: "lines" puts each on a line 'A. text' under 'Choices:', "inline" all after the question as '(A) text'.
    Raises ValueError for a placeholder that nothing fills: the published training sent `{args.target_length}`.
    """

    def __init__(self, system: str | None, instruction: str, words: int | None = None, options: str = "lines"):
        if options not in ("lines", "inline"):
            raise ValueError(f"prompt.options must be 'lines' or 'inline', got {options!r}")
        if words is not None:
            instruction = instruction.replace("{words}", str(words))
        if (left := re.search(r"\{[^}]*\}", f"{system or ''} {instruction}")) is not None:
            raise ValueError(f"prompt.instruction: nothing fills the placeholder {left.group()!r}"
                             + ("; set prompt.words" if left.group() == "{words}" else ""))  # fmt: skip
        self.system, self.instruction, self.options = system, instruction, options

    def messages(self, question: Question) -> list[dict]:
        """The chat as the processor's template wants it. Raises ValueError above 26 options."""
        user = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": self.text(question)}]}
        if self.system is None:
            return [user]
        return [{"role": "system", "content": [{"type": "text", "text": self.system}]}, user]

    def text(self, question: Question) -> str:
        """The user turn's text."""
        if len(question.choices) > len(ascii_uppercase):
            raise ValueError(f"question {question.id}: {len(question.choices)} options, letters end at Z")
        lettered = list(zip(ascii_uppercase, question.choices, strict=False))
        if self.options == "inline":
            return f"{self.instruction}{question.question} " + " ".join(f"({a}) {text}" for a, text in lettered)
        return f"{self.instruction}{question.question}\nChoices:\n" + "\n".join(f"{a}. {text}" for a, text in lettered)
