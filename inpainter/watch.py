"""Watching a training: a collapsed output stops it with a message."""

from torch import Tensor

from common.training import TrainingError

SATURATED_SHARE = 0.9
LOGS_IN_A_ROW = 5


class CollapseWatch:
    """Recognises an output that stays at the clamp, where a hard clamp has no gradient."""

    def __init__(self, in_a_row: int = 0) -> None:
        self.in_a_row = in_a_row
        """Logged batches above the limit up to now."""

    def check(self, step: int, composite: Tensor, real: Tensor, mask: Tensor) -> float:
        """Notes one batch; returns the share of the hole that wrongly sits at -1 or 1.

        composite, real: (N, C, H, W); mask: (N, 1, H, W), 1 = hole. Raises TrainingError after
        several logged batches in a row above 90 %.
        """
        hole = (mask != 0).expand_as(real)
        wrong = (composite.abs() >= 1) & (real.abs() < 1) & hole
        free = ((real.abs() < 1) & hole).sum().clamp(min=1)
        share = (wrong.sum() / free).item()
        self.in_a_row = self.in_a_row + 1 if share > SATURATED_SHARE else 0
        if self.in_a_row >= LOGS_IN_A_ROW:
            raise TrainingError(
                f"The generator collapsed: at step {step}, {share:.0%} of the hole is stuck at -1 "
                "or 1. Start again with another seed, train.init: he, train.warmup_steps: 500 and "
                "netG.output_clamp: leaky (all three are set in configs/default.yaml)."
            )
        return share
