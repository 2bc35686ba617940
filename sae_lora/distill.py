"""The training loop: the student learns the teacher's distribution; only adapters move."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lora.checkpoint import State
from sae_lora.config import Reduction, Schedule, TrainConfig
from sae_lora.errors import UserError
from sae_lora.kl import chunked_kl_sum
from sae_lora.lora import adapters_disabled, set_adapter_dropout, trainable_weights
from sae_lora.metrics import Evaluator, kept_positions
from sae_lora.models import LanguageModel
from sae_lora.records import CurvePoint, gap_closed
from sae_lora.splice import Coder, spliced


@dataclass(frozen=True)
class StepDone:
    """A step that was taken."""

    step: int
    """Optimiser steps taken."""
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


class Training:
    """The training of one student: from its first step, or on from any other.

    Between two steps `state()` is all there is to know: put back into a new object with
    `restore()`, the rest of the curve and the adapters come out the same to the last bit.

    Args:
        model: The language model with its adapters.
        saes: SAE by hookpoint.
        evaluate: Measures base, spliced and student on held-out tokens.
        config: The optimisation.
        steps: Number of steps in all.
    """

    def __init__(
        self,
        model: LanguageModel,
        saes: Mapping[str, Coder],
        evaluate: Evaluator,
        config: TrainConfig,
        steps: int,
    ) -> None:
        self.step = 0
        """Optimiser steps taken."""
        self._model = model
        self._saes = saes
        self._evaluate = evaluate
        self._config = config
        self._steps = steps
        self._weights = trainable_weights(model)
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=config.lr, weight_decay=config.weight_decay
        )
        self._rate_factor = rate_factor(config, steps)
        self._interval = _Interval(model.device, _Read())
        self._tokens = 0
        self._train_seconds = 0.0
        self._points = 0
        self._evaluated_at: int | None = None
        self._next_evaluation = 0
        self._lr: float | None = None
        self._last_norm: Tensor | float | None = None

    def points(
        self,
        batches: Iterable[Tensor],
        after_step: Callable[[StepDone], None] = lambda progress: None,
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Iterator[CurvePoint]:
        """Trains to the end; yields a point before the first step, on the way, and after the last.

        Args:
            batches: Training tokens `[batch, pos]`, one item a step, beginning with that of the
                step that comes next.
            after_step: Called after every step, when `state()` may be taken.
            held: Entered around each step: what it keeps out cannot leave one half done.

        Raises:
            UserError: When the loss stops being a number.
        """
        source = iter(batches)
        set_adapter_dropout(self._model, True)
        try:
            if self._evaluation_is_due():
                yield self._point()
                self._note_evaluation()
            self._interval.run()
            while self.step < self._steps:
                with held():
                    tokens = next(source)
                    kl = self._take_step(tokens.to(self._model.device, non_blocking=True))
                after_step(StepDone(self.step, self._tokens, kl, tokens.numel()))
                if self._evaluation_is_due():
                    yield self._point()
                    self._note_evaluation()
                    self._interval.run()
        finally:
            set_adapter_dropout(self._model, False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in the block is no training time."""
        self._interval.read()
        yield
        self._interval.run()

    def _take_step(self, tokens: Tensor) -> Tensor:
        """One step on the tokens `[batch, pos]`; returns their summed KL."""
        model, config = self._model, self._config
        lr = config.lr * self._rate_factor(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr

        # ---- the step -------------------------------------------------------------------------
        keep = kept_positions(tokens, self._evaluate.special_ids)
        with torch.no_grad(), adapters_disabled(model.model):
            teacher = model.hidden(tokens)
        with spliced(model, self._saes, keep):
            student = model.hidden(tokens)
        kl = chunked_kl_sum(teacher, student, model.logits, config.kl_chunk_tokens)
        loss = kl / (tokens.numel() if config.kl_reduction is Reduction.token_mean else len(tokens))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._weights.values(), config.grad_clip or math.inf)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        # ---------------------------------------------------------------------------------------

        self.step += 1
        self._tokens += tokens.numel()
        self._lr, self._last_norm = lr, norm
        self._interval.add(kl.detach(), tokens.numel())
        return kl.detach()

    def _evaluation_is_due(self) -> bool:
        at_its_time = self._tokens >= self._next_evaluation or self.step == self._steps
        return at_its_time and self._evaluated_at != self.step

    def _point(self) -> CurvePoint:
        interval = self._interval.read()
        self._refuse_nonsense(interval.kl)
        measured = self._evaluate()
        return CurvePoint(
            step=self.step,
            tokens=self._tokens,
            train_seconds=self._train_seconds + interval.seconds,
            base_ce=measured.base_ce,
            spliced_ce=measured.spliced_ce,
            student_ce=measured.student_ce,
            ce_gap=measured.student_ce - measured.base_ce,
            gap_closed=gap_closed(measured.base_ce, measured.spliced_ce, measured.student_ce),
            kl=measured.kl,
            top1_agreement=measured.top1_agreement,
            fvu=sum(measured.fvu.values()) / len(measured.fvu),
            l0=sum(measured.l0.values()) / len(measured.l0),
            per_sae={
                hookpoint: {"fvu": measured.fvu[hookpoint], "l0": measured.l0[hookpoint]}
                for hookpoint in measured.l0
            },
            train_loss=interval.kl / interval.tokens if interval.tokens else None,
            lr=self._lr,
            grad_norm=None if self._last_norm is None else float(self._last_norm),
            tokens_per_second=interval.tokens / interval.seconds if interval.tokens else None,
        )

    def _note_evaluation(self) -> None:
        """Only once the point has been taken over: stopped before, it is measured again."""
        self._train_seconds += self._interval.read().seconds
        self._interval = _Interval(self._model.device, _Read())
        self._points += 1
        self._evaluated_at = self.step
        self._next_evaluation = self._tokens + self._config.eval_every_tokens

    def _refuse_nonsense(self, kl: float) -> None:
        if not math.isfinite(kl):
            raise UserError(
                f"the training loss is {kl} after {self._tokens} tokens; "
                f"train.lr={self._config.lr:g} may be too high"
            )

    def state(self) -> State:
        """Everything that the rest of the training depends on, besides model, SAEs and text.

        Its values `step` and `points` say how many steps were taken and points taken over.

        Raises:
            UserError: When the loss has stopped being a number: that is no state to go on from.
        """
        interval = self._interval.read()
        self._refuse_nonsense(interval.kl)
        tensors = {f"adapter/{name}": weight.detach() for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            for key, value in self._optimizer.state[weight].items():
                tensors[f"optimizer/{key}/{name}"] = value
        tensors["rng/cpu"] = torch.get_rng_state()
        if self._model.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self._model.device)
        values = {
            "step": self.step,
            "tokens": self._tokens,
            "train_seconds": self._train_seconds,
            "points": self._points,
            "evaluated_at": self._evaluated_at,
            "next_evaluation": self._next_evaluation,
            "lr": self._lr,
            "grad_norm": None if self._last_norm is None else float(self._last_norm),
            "interval": interval._asdict(),
        }
        return State(tensors, values)

    def restore(self, state: State) -> None:
        """Puts back what `state()` gave, in this process or another."""
        for name, weight in self._weights.items():
            weight.data.copy_(state.tensors[f"adapter/{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (kept := state.tensors.get(f"optimizer/{key}/{name}")) is not None:
                    # AdamW counts its steps on the CPU, wherever the weights are.
                    place = "cpu" if key == "step" else weight.device
                    self._optimizer.state[weight][key] = kept.to(place)
        values = state.values
        self.step = values["step"]
        self._tokens = values["tokens"]
        self._train_seconds = values["train_seconds"]
        self._points = values["points"]
        self._evaluated_at = values["evaluated_at"]
        self._next_evaluation = values["next_evaluation"]
        self._lr = values["lr"]
        self._last_norm = values["grad_norm"]
        self._interval = _Interval(self._model.device, _Read(**values["interval"]))
        torch.set_rng_state(state.tensors["rng/cpu"].cpu())
        if "rng/cuda" in state.tensors and self._model.device.type == "cuda":
            torch.cuda.set_rng_state(state.tensors["rng/cuda"].cpu(), self._model.device)


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


class _Read(NamedTuple):
    """What an interval has gathered: summed KL in nats, tokens, seconds of training."""

    kl: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


class _Interval:
    """Loss, tokens and seconds since the last evaluation; reads the device only when asked."""

    def __init__(self, device: torch.device, so_far: _Read) -> None:
        self._kl = torch.tensor(so_far.kl, dtype=torch.float64, device=device)
        self._tokens = so_far.tokens
        self._seconds = so_far.seconds
        self._running_since: float | None = None

    def run(self) -> None:
        """Starts the clock."""
        self._running_since = time.perf_counter()

    def add(self, kl: Tensor, tokens: int) -> None:
        self._kl += kl
        self._tokens += tokens

    def read(self) -> _Read:
        """Stops the clock and reads everything."""
        kl = float(self._kl)  # a GPU works on after a step has returned: this waits for it
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
            self._running_since = None
        return _Read(kl, self._tokens, self._seconds)
