"""Dynamic loss scaling, without which float16 gradients vanish.

float16 reaches down to 6e-8. Gradients of a trained model lie partly below that, so the loss is multiplied by a large
power of two before the backward pass, and the gradients are divided by it after, in float32. The factor is as large as
overflow allows: halved when a gradient overflows, doubled after a long time without (Micikevicius et al. 2018, arXiv
1710.03740, section 3.2). Pure.

Other trainers leave out the step that overflowed. Here its batch goes through the model again with the smaller factor:
no sample is lost, and the step numbers of a run mean the same in every precision.
"""

from __future__ import annotations

from dataclasses import dataclass

_SMALLEST = 2.0**-14


@dataclass
class LossScale:
    """The factor, and how many steps it has been good for. Defaults as torch.amp.GradScaler's."""

    factor: float = 2.0**16
    good_steps: int = 0
    growth_interval: int = 2000

    def fitted(self) -> None:
        """The step's gradients were finite."""
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.factor *= 2
            self.good_steps = 0

    def overflowed(self) -> bool:
        """The step's gradients were not finite: tries half the factor. False when that is no use any more."""
        self.good_steps = 0
        self.factor /= 2
        return self.factor >= _SMALLEST

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"factor": self.factor, "good_steps": self.good_steps}

    def load_state(self, state: dict[str, float]) -> None:
        """Takes back what `state` gave."""
        self.factor, self.good_steps = float(state["factor"]), int(state["good_steps"])
