"""The training loop: the student learns the teacher's distribution; only adapters move."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lora.config import Reduction, Schedule, TrainConfig
from sae_lora.errors import UserError
from sae_lora.kl import chunked_kl_sum
from sae_lora.lora import adapters_disabled, set_adapter_dropout, trainable_weights
from sae_lora.metrics import Evaluator, kept_positions
from sae_lora.models import LanguageModel
from sae_lora.records import CurvePoint, gap_closed
from sae_lora.splice import Coder, spliced


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step."""

    tokens: int
    """Tokens trained on so far."""
    batch_kl: Tensor
    """KL(teacher ‖ student) of the last batch, summed over its tokens; on the device."""
    batch_tokens: int
    """Tokens in that batch."""

    @property
    def loss(self) -> float:
        """KL(teacher ‖ student) of the last batch in nats per token. Waits for the device."""
        return float(self.batch_kl) / self.batch_tokens


def distill(
    model: LanguageModel,
    saes: Mapping[str, Coder],
    batches: Iterable[Tensor],
    evaluate: Evaluator,
    config: TrainConfig,
    steps: int,
    on_step: Callable[[Progress], None],
) -> Iterator[CurvePoint]:
    """Trains the model's adapters; yields a point before the first step, on the way, at the end.

    Args:
        model: The language model with its adapters.
        saes: SAE by hookpoint.
        batches: Training tokens `[batch, pos]`, one item a step.
        evaluate: Measures base, spliced and student on held-out tokens.
        config: The optimisation.
        steps: Number of batches to take.
        on_step: Called after every step.

    Raises:
        UserError: When the loss stops being a number.
    """
    weights = trainable_weights(model)
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(config, steps))
    since_point = _Interval(model.device)
    tokens_done, train_seconds, next_evaluation = 0, 0.0, config.eval_every_tokens
    yield _point(evaluate, step=0, tokens=0, train_seconds=0.0)

    set_adapter_dropout(model, True)
    since_point.restart()
    for step, tokens in enumerate(batches, start=1):
        tokens = tokens.to(model.device, non_blocking=True)
        lr = float(scheduler.get_last_lr()[0])

        # ---- the step -------------------------------------------------------------------------
        keep = kept_positions(tokens, evaluate.special_ids)
        with torch.no_grad(), adapters_disabled(model.model):
            teacher = model.hidden(tokens)
        with spliced(model, saes, keep):
            student = model.hidden(tokens)
        kl = chunked_kl_sum(teacher, student, model.logits, config.kl_chunk_tokens)
        loss = kl / (tokens.numel() if config.kl_reduction is Reduction.token_mean else len(tokens))
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, config.grad_clip or math.inf)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        # ---------------------------------------------------------------------------------------

        tokens_done += tokens.numel()
        since_point.add(kl.detach(), tokens.numel())
        on_step(Progress(tokens_done, kl.detach(), tokens.numel()))
        if tokens_done >= next_evaluation or step == steps:
            next_evaluation = tokens_done + config.eval_every_tokens
            loss_value, seconds, trained = since_point.read()
            if not math.isfinite(loss_value):
                raise UserError(
                    f"the training loss is {loss_value} after {tokens_done} tokens; "
                    f"train.lr={config.lr:g} may be too high"
                )
            train_seconds += seconds
            yield _point(
                evaluate,
                step=step,
                tokens=tokens_done,
                train_seconds=train_seconds,
                train_loss=loss_value,
                lr=lr,
                grad_norm=float(grad_norm),
                tokens_per_second=trained / seconds,
            )
            since_point.restart()
        if step == steps:
            break
    set_adapter_dropout(model, False)


def rate_factor(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of each step, as a share of the peak.

    Rises over the warm-up, then stays (constant) or falls to reach zero one step after the last
    (linear).
    """
    warmup = round(config.warmup_share * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        match config.schedule:
            case Schedule.constant:
                return 1.0
            case Schedule.linear:
                return max(0.0, (steps - step) / max(1, steps - warmup))
            case _:
                raise NotImplementedError(config.schedule)

    return factor


def _point(evaluate: Evaluator, **progress: float | int | None) -> CurvePoint:
    found = evaluate()
    return CurvePoint(
        base_ce=found.base_ce,
        spliced_ce=found.spliced_ce,
        student_ce=found.student_ce,
        ce_gap=found.student_ce - found.base_ce,
        gap_closed=gap_closed(found.base_ce, found.spliced_ce, found.student_ce),
        kl=found.kl,
        top1_agreement=found.top1_agreement,
        fvu=sum(found.fvu.values()) / len(found.fvu),
        l0=sum(found.l0.values()) / len(found.l0),
        per_sae={
            hookpoint: {"fvu": found.fvu[hookpoint], "l0": found.l0[hookpoint]} for hookpoint in found.l0
        },
        **progress,  # pyright: ignore[reportArgumentType]
    )


class _Interval:
    """Loss, tokens and seconds since the last evaluation; reads the device only when asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        self._synchronise()
        self._started = time.perf_counter()
        self._kl = torch.zeros((), dtype=torch.float64, device=self._device)
        self._tokens = 0

    def add(self, kl: Tensor, tokens: int) -> None:
        self._kl += kl
        self._tokens += tokens

    def read(self) -> tuple[float, float, int]:
        """Mean KL per token, seconds, tokens."""
        self._synchronise()
        seconds = time.perf_counter() - self._started
        return float(self._kl) / self._tokens, seconds, self._tokens

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
