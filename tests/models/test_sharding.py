"""A model that is divided among processes computes the same, and each process holds its part."""

import copy
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lora.config.schema import LoRAConfig
from sae_lora.models import lora
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes import sparse
from tests.support.attempts import FORKS
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import D_MODEL, random_tokens, small_model

CPU = torch.device("cpu")


def views(model: LanguageModel) -> list[LanguageModel]:
    """Two views with adapters of their own."""
    made = []
    for rank in (2, 3):
        view = model.view()
        lora.attach(view, LoRAConfig(rank=rank, blocks=[1, 2, 3]), 0)
        torch.manual_seed(rank)
        for weight in lora.trainable_weights(view).values():
            weight.data.normal_(0, 0.1)
        made.append(view)
    return made


def passes(model: LanguageModel, students: list[LanguageModel], tokens: Tensor) -> list[Tensor]:
    """The states of model and views, then the gradients of the adapters: forward passes come first."""
    resid = model.resid_entering(1, tokens)
    states = [student.hidden(tokens, 1, resid) for student in students]
    teacher = model.hidden(tokens)
    results = [teacher, *(state.detach() for state in states)]
    for student, state in zip(students, states, strict=True):
        (state - teacher).square().sum().backward()
        for weight in lora.trainable_weights(student).values():
            assert weight.grad is not None
            results.append(weight.grad)
            weight.grad = None
    return results


def through(sae: Any, resid: Tensor) -> list[Tensor]:
    inputs = resid.clone().requires_grad_()
    recon = sae.decode(sae.encode(inputs * 1.0))
    return [recon.detach(), *torch.autograd.grad(recon.square().sum(), inputs)]


class Gathers(TorchDispatchMode):
    """Counts how often processes gather something inside the `with` block."""

    number = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        self.number += "allgather" in function.name()
        return function(*arguments, **(keywords or {}))


def gathered_before_each_block(model: LanguageModel, tokens: Tensor) -> list[int]:
    """The number of blocks that were gathered when each block runs, in a pass through the model."""
    model.hidden(tokens)  # uses what a backward pass has gathered ahead
    numbers = []
    with Gathers() as gathers, ExitStack() as hooks:
        for block in model.blocks:
            inside = next(block.children())
            handle = inside.register_forward_pre_hook(lambda *_: numbers.append(gathers.number))
            hooks.callback(handle.remove)
        model.hidden(tokens)
    return numbers


def divided(rank: int, size: int, meeting: str) -> None:
    """The checks of one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    for family in ("gemma2", "llama", "gpt2"):
        tokens = random_tokens(batch=2, length=16, seed=rank)  # each process has its own batch
        whole, model = small_model(family), small_model(family)
        expected = passes(whole, views(whole), tokens)
        model.divide(CPU, size)
        students = views(model)
        for _ in range(2):
            actual = passes(model, students, tokens)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        bytes_of_blocks = sum(4 * weight.numel() for weight in whole.blocks.parameters())
        held = sum(part.to_local().nbytes for shard in model.shards for part in shard.parameters())
        assert held == pytest.approx(bytes_of_blocks / size, rel=0.05)
        assert not any(weight.untyped_storage().nbytes() for weight in model.blocks.parameters())
        n_blocks = len(model.blocks)
        ahead = [min(number + 2, n_blocks) for number in range(n_blocks)]
        assert gathered_before_each_block(model, tokens) == ahead
    resid = torch.randn(3, 5, D_MODEL, generator=torch.Generator().manual_seed(rank))
    for sae in (topk_sae(), jumprelu_sae(), sparse.SparseSAE(jumprelu_sae()).eval()):
        expected = through(copy.deepcopy(sae), resid)
        sparse.divide(sae, CPU, size)
        for _ in range(2):
            actual = through(sae, resid)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        matrices = getattr(sae, "sae", sae)
        assert not matrices.W_enc.untyped_storage().nbytes()
        assert not matrices.W_dec.untyped_storage().nbytes()
    os._exit(0)


@pytest.mark.slow
def test_divided_models_and_saes_compute_the_same(tmp_path: Path) -> None:
    """In four processes."""
    size = 4
    meeting = str(tmp_path / "meeting")
    processes = [FORKS.Process(target=divided, args=(rank, size, meeting)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size
