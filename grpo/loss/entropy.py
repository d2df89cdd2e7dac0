"""Coefficient α of the entropy bonus:  L = aggregate[ ... - α·H_{i,t} ], H in nats.

A bonus with memory is an object: `coefficient` is a plain number during a step, `update(mean_entropy)` is called once
after it with the mean over the step's tokens, `state()` goes into the checkpoint and `load_state()` brings it back.
"""

from __future__ import annotations


class Fixed:
    """The same α at every step: PPO (arXiv 1707.06347) eq. 9."""

    def __init__(self, *, coefficient: float):
        if coefficient < 0:
            raise ValueError(f"entropy.coefficient must be at least 0, got {coefficient}")
        self.coefficient = coefficient

    def update(self, mean_entropy: float) -> None:
        """Nothing to learn from the step."""

    def state(self) -> dict[str, float]:
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        """Nothing to restore."""

    def describe(self) -> str:
        return f"{self.coefficient:g}·H"


class Adaptive:
    """α rises by `delta` while entropy is at or below `target`, else falls; it acts only at or below.

        c ← clip(c ± delta, low, high)        α = c if the last step's entropy ≤ target else 0

    Skywork-OR1 (arXiv 2505.22312), adaptive entropy control. Departures: the entropy that decides is that of the step
    before (the paper's is that of the rollout about to be learnt from), as in TRL; α is 0 at the first step.
    """

    def __init__(self, *, target: float = 0.2, delta: float = 0.005, start: float = 0.0, low: float = 0.0,
                 high: float = 1.0):  # fmt: skip
        if not 0 <= low <= start <= high:
            raise ValueError(f"entropy: 0 <= low <= start <= high does not hold for {low}, {start}, {high}")
        self.target, self.delta, self.low, self.high = target, delta, low, high
        self._level, self._last = start, None

    @property
    def coefficient(self) -> float:
        return self._level if self._last is not None and self._last <= self.target else 0.0

    def update(self, mean_entropy: float) -> None:
        """Move the level after a step whose tokens had this mean entropy (nats, over all ranks)."""
        step = self.delta if mean_entropy <= self.target else -self.delta
        self._level = min(max(self._level + step, self.low), self.high)
        self._last = mean_entropy

    def state(self) -> dict[str, float]:
        return {"level": self._level} | ({} if self._last is None else {"last": self._last})

    def load_state(self, state: dict[str, float]) -> None:
        self._level, self._last = state["level"], state.get("last")

    def describe(self) -> str:
        return (
            f"α·H, α moving by {self.delta:g} a step within [{self.low:g}, {self.high:g}] towards H = {self.target:g}"
        )
