"""Named reward components and their weighted sum: r = Σ_i w_i f_i(completion), every f_i kept beside the total."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real

from rewards.apart import Apart, ApartError, call

# What a reward may ask for by naming it as a keyword.
CONTEXT = {
    "answer": "index of the gold option",
    "choices": "option texts without letters",
    "question": "text of the question",
    "n_tokens": "length of the completion in tokens",
    "truncated": "whether the completion was cut by the length limit",
}


class RewardError(RuntimeError):
    """Completions could not be scored: too many of a step, or none at all."""


@dataclass(frozen=True)
class Component:
    """One term of the sum. A weight of 0 measures without optimising."""

    weight: float
    function: Callable[..., float]


@dataclass(frozen=True)
class Failure:
    """A component that raised, gave no finite number or took too long, on one completion."""

    index: int  # of the completion in the call
    component: str
    error: str


@dataclass(frozen=True)
class Scores:
    """Rewards of n completions with R components. A failed component is NaN, and so is the total of its completion."""

    components: list[list[float]]  # [n][R], before weights, in the order of WeightedRewards.names
    total: list[float]  # [n]
    failures: list[Failure]


class WeightedRewards:
    """r = Σ_i w_i f_i, built from `{name: {"weight": w, "function": f}}`.

    Signatures are checked here, not after a rollout: a function is given those keywords of CONTEXT that it declares.

    `max_failed` is the fraction of a step's completions that may fail before the run is stopped: see `check`.
    `seconds` is what one call of a function may take, in a process of their own (rewards/apart.py); None: no limit.
    Raises ValueError for no component, a weight that is no finite number, or a function that cannot be called so.
    """

    def __init__(self, components: Mapping[str, Mapping], max_failed: float = 0.1,
                 seconds: float | None = 30.0):  # fmt: skip
        if not components:
            raise ValueError("components: at least one reward is needed, such as accuracy")
        if not 0 <= max_failed <= 1:
            raise ValueError(f"max_failed is a fraction from 0 to 1, got {max_failed}")
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"seconds must be above 0, or null for no limit, got {seconds}")
        self.max_failed = max_failed
        self.components = {str(name): _component(name, entry) for name, entry in components.items()}
        self._wanted = {name: _wanted(name, c.function) for name, c in self.components.items()}
        functions = {name: c.function for name, c in self.components.items()}
        self._call = Apart(functions, seconds) if seconds else partial(_here, functions)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.components)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(c.weight for c in self.components.values())

    def score(self, completions: Sequence[str], *, contexts: Sequence[Mapping]) -> Scores:
        """Score each completion with its context (the keys of CONTEXT that the components ask for).

        Raises ValueError when a context lacks a key, RewardError when the functions cannot be imported.
        """
        calls = []
        for index, (completion, context) in enumerate(zip(completions, contexts, strict=True)):
            for name in self.components:
                if missing := [key for key in self._wanted[name] if key not in context]:
                    raise ValueError(f"contexts[{index}] lacks {missing[0]!r}, which the reward {name!r} asks for")
                calls.append((name, (completion,), {k: context[k] for k in self._wanted[name]}))
        try:
            answers = self._call(calls)
        except ApartError as error:
            raise RewardError(str(error)) from error
        # What failed is counted and shown, never taken for a reward of 0.
        width = len(self.components)
        failures = [Failure(at // width, calls[at][0], error) for at, (_, error) in enumerate(answers) if error]
        values = [math.nan if error else value for value, error in answers]
        rows = [values[at : at + width] for at in range(0, len(values), width)]
        total = [sum(w * r for w, r in zip(self.weights, row, strict=True)) for row in rows]
        return Scores(rows, total, failures)

    def close(self) -> None:
        """End the functions' process."""
        if isinstance(self._call, Apart):
            self._call.close()

    def describe(self) -> str:
        """The sum in one line, with the hyper-parameters that were given: "1 accuracy + 0.5 length(target=25)".

        A component that is named unlike its function shows both: "1 accuracy:exact".
        """
        text = ""
        for name, component in self.components.items():
            given = ", ".join(f"{k}={v!r}" for k, v in _given(component.function).items())
            own = _name(component.function)
            if text:
                text += " - " if component.weight < 0 else " + "
            elif component.weight < 0:
                text = "-"
            text += f"{abs(component.weight):g} {name}{'' if own == name else ':' + own}{f'({given})' if given else ''}"
        return text

    def check(self, failures: Sequence[str], n: int) -> None:
        """Raise RewardError when more than `max_failed` of a step's `n` completions failed, a line each."""
        failed = len(failures)
        if failed > self.max_failed * n:
            first = "\n".join(f"  {line}" for line in failures[:3])
            raise RewardError(
                f"{failed} of {n} completions could not be scored, more than max_failed={self.max_failed:g} allows:\n"
                f"{first}\nMend the reward function, or leave it out with ~rewards.components.NAME; "
                f"rewards.max_failed=1 lets the run go on without these completions."
            )


def _component(name: str, entry: Mapping) -> Component:
    if not isinstance(entry, Mapping) or set(entry) != {"weight", "function"}:
        raise ValueError(f"components.{name} must be {{weight: NUMBER, function: ...}}, got {entry!r}")
    weight, function = entry["weight"], entry["function"]
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise ValueError(f"components.{name}.weight must be a finite number, got {weight!r}")
    if not callable(function):
        raise ValueError(f"components.{name}.function is {function!r}, no function: is `_partial_: true` missing?")
    if isinstance(function, partial):  # Hydra's own kind checks its target at every call: dearer than the reward
        function = partial(function.func, *function.args, **function.keywords)
    return Component(float(weight), function)


def _wanted(name: str, function: Callable) -> tuple[str, ...]:
    """The context keywords that `function` takes. Raises ValueError when it needs more than the context holds."""
    problem = f"components.{name}: {_name(function)} cannot be called as a reward: "
    hint = f"; the context offers {', '.join(CONTEXT)}, everything else must be given as a hyper-parameter"
    if fixed := CONTEXT.keys() & _given(function).keys():
        raise ValueError(f"{problem}{min(fixed)!r} comes from the context and cannot be set{hint}")
    try:
        signature = inspect.signature(function)
        parameters = signature.parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        wanted = tuple(key for key in CONTEXT if takes_all or key in parameters)
        signature.bind("", **dict.fromkeys(wanted))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{problem}{error}{hint}") from error
    return wanted


def _given(function: Callable) -> Mapping[str, object]:
    return function.keywords if isinstance(function, partial) else {}


def _name(function: Callable) -> str:
    inner = function.func if isinstance(function, partial) else function
    return getattr(inner, "__name__", type(inner).__name__)


def _here(functions: Mapping[str, Callable], calls: Sequence[tuple[str, tuple, Mapping]]) -> list[tuple]:
    return [call(functions[name], *args, **kwargs) for name, args, kwargs in calls]
