"""Formulas as text, so that a run can print the exact objective it optimises."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial


def formula(template: str):
    """Attach an equation to a function; `{name}` stands for the value of its keyword argument."""

    def attach(function: Callable) -> Callable:
        function.formula = template
        return function

    return attach


def describe(function: Callable) -> str:
    """The equation of a function or partial with its numbers filled in; `module.name(arguments)` where it has none."""
    inner = function.func if isinstance(function, partial) else function
    given = function.keywords if isinstance(function, partial) else {}
    defaults = {
        k: p.default for k, p in inspect.signature(inner).parameters.items() if p.default is not inspect.Parameter.empty
    }
    values = defaults | given
    if hasattr(inner, "formula"):
        return inner.formula.format(**values)
    arguments = ", ".join(f"{k}={v}" for k, v in values.items())
    return f"{inner.__module__}.{getattr(inner, '__name__', type(inner).__name__)}({arguments})"
