"""The learning-rate schedule."""

from sae_lora.config.enums import Schedule
from sae_lora.config.schema import TrainConfig


def lr_factor(config: TrainConfig, steps: int, step: int) -> float:
    """The learning rate of a step, as a share of the peak.

    It rises over the warm-up. Then it stays (constant), or falls so that it would reach zero one step
    after the last (linear).
    """
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    match config.schedule:
        case Schedule.constant:
            return 1.0
        case Schedule.linear:
            return max(0.0, (steps - step) / max(1, steps - warmup))
        case _:
            raise NotImplementedError(config.schedule)
