"""Formulas as text, so that a run can print the exact objective it optimises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial


def formula(template: str | Callable[..., str]):
    """Attach an equation to a function; `{name}` stands for the value of its keyword argument.

    Where the text depends on an argument, a function from the arguments to the text takes the template's place.
    """

    def attach(function: Callable) -> Callable:
        function.formula = template
        return function

    return attach


def plain(function: Callable) -> Callable:
    """The function inside a partial, which carries marks such as `formula`; a plain function is itself."""
    return function.func if isinstance(function, partial) else function


def arguments(function: Callable) -> Mapping[str, object]:
    """Values of a function's keyword arguments: defaults, overridden by those that a partial has bound."""
    given = function.keywords if isinstance(function, partial) else {}
    defaults = {
        k: p.default
        for k, p in inspect.signature(plain(function)).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    return defaults | given


def describe(function: Callable) -> str:
    """The equation of a function or partial with its numbers filled in; `module.name(arguments)` where it has none."""
    inner, values = plain(function), arguments(function)
    if hasattr(inner, "formula"):
        return inner.formula(**values) if callable(inner.formula) else inner.formula.format(**values)
    listed = ", ".join(f"{k}={v}" for k, v in values.items())
    return f"{inner.__module__}.{getattr(inner, '__name__', type(inner).__name__)}({listed})"
