"""A soft penalty before the length limit."""

from __future__ import annotations


def overlong(completion: str, *, n_tokens: int, max_tokens: int, cache: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476) eq. 13, in [-1, 0].

        n <= M - C:         0
        M - C < n <= M:     ((M - C) - n) / C
        M < n:              -1

    n `n_tokens`, M `max_tokens` (set it to the run's limit), C `cache`, the tokens over which the penalty grows.
    DAPO uses M = 20480, C = 4096. Raises ValueError unless 0 < cache <= max_tokens.
    """
    if not 0 < cache <= max_tokens:
        raise ValueError(f"cache={cache} must be above 0 and at most max_tokens={max_tokens}")
    return max(min((max_tokens - cache - n_tokens) / cache, 0.0), -1.0)
