"""The recipe of the embedded default: tokenizer, language model, SAEs, all from the standard library.

Deterministic given its seed, on one kind of machine with the same number of threads.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora.common.console import console
from sae_lora.config.enums import DType
from sae_lora.config.schema import ModelConfig
from sae_lora.data.documents import Document, in_validation, shuffled, stdlib_documents
from sae_lora.data.packing import Packer, convention_of, shuffled_batches, tokenised
from sae_lora.models.loading import load_model, load_tokenizer
from scripts.embedded import language_model
from scripts.embedded.saes import SAEBudget, TopKRequest, train_topk

VOCABULARY = 2048
CONTEXT_LENGTH = 128
VALIDATION_SHARE = 0.1
"""The default of `data.validation_share`: what is held out here is held out there."""

BLOCKS = range(1, 7)
SPARSITIES = (4, 8, 16, 32)
WIDTHS = (256, 512, 2048, 4096)


def requests() -> dict[str, TopKRequest]:
    """The SAEs that ship: every sparsity at every block, and every width at block 3."""
    wanted = [TopKRequest(block, 1024, k) for block in BLOCKS for k in SPARSITIES]
    wanted += [TopKRequest(3, width, 8) for width in WIDTHS]
    return {f"block_{one.block}-width_{one.width}-l0_{one.k}": one for one in wanted}


def make_model(folder: Path, budget: language_model.Budget, seed: int) -> None:
    """Trains tokenizer and language model and writes them in transformers' format, in bfloat16."""
    train, validation = _documents(seed)
    tokenizer = language_model.train_tokenizer((document.text for document in train), VOCABULARY)
    # The library alone is 2M tokens, which a model of this size learns by heart in a few passes.
    more = [document for document in stdlib_documents(tests=True) if not _held_out(document)]
    sequences = _packed(shuffled([*train, *more], seed), tokenizer)
    held_out = _packed(validation, tokenizer)
    console.print(
        f"{len(train):,} documents of the library and {len(more):,} of its tests: "
        f"{len(sequences):,} training sequences of {CONTEXT_LENGTH} tokens"
    )
    set_seed(seed)
    convention = convention_of(tokenizer)
    model = language_model.new_model(VOCABULARY, convention.bos, convention.separator)

    def report(step: int, steps: int, loss: float) -> None:
        if step % 100 == 0 or step == steps:
            console.print(f"step {step:,} of {steps:,}  loss {loss:.3f} nats/token")

    language_model.train(model, sequences, budget, seed, report)
    model.to(dtype=torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(folder)
    ce = language_model.validation_ce(model.to(dtype=torch.float32), held_out)  # pyright: ignore[reportCallIssue]
    console.print(f"held-out cross-entropy {ce:.4f} nats/token")


def make_saes(folder: Path, model_folder: Path, budget: SAEBudget, seed: int) -> None:
    """Trains the SAEs on the model's activations and writes them in sae-lens's format, in float16."""
    config = ModelConfig(name=str(model_folder))
    model = load_model(config, DType.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(config)
    sequences = _packed(_documents(seed)[0], tokenizer)
    set_seed(seed)
    trained = train_topk(
        requests(),
        model,
        shuffled_batches(sequences, 64, seed),
        budget,
        metadata={
            "model_name": "tiny",
            "dataset_path": "the Python standard library",
            "context_size": CONTEXT_LENGTH,
            "prepend_bos": True,
        },
        # The residual at BOS is an order of magnitude larger than elsewhere: an SAE that must also
        # reconstruct it learns little else, and its FVU says nothing.
        special_ids=torch.tensor(convention_of(tokenizer)),
    )
    for name, sae in trained.items():
        sae.to("cpu", torch.float16).save_inference_model(folder / name)


def make(folder: Path, budget: language_model.Budget, sae_budget: SAEBudget, seed: int) -> None:
    """Makes everything anew; the folder's old content is replaced at the end."""
    beside = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(beside, ignore_errors=True)
    make_model(beside / "model", budget, seed)
    make_saes(beside / "saes", beside / "model", sae_budget, seed)
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)


def _documents(seed: int) -> tuple[list[Document], list[Document]]:
    """The library's documents: those to train on, and those to hold out."""
    train: list[Document] = []
    validation: list[Document] = []
    for document in shuffled(stdlib_documents(), seed):
        (validation if _held_out(document) else train).append(document)
    return train, validation


def _held_out(document: Document) -> bool:
    return in_validation(document.key, VALIDATION_SHARE)


def _packed(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    packer = Packer(CONTEXT_LENGTH, convention_of(tokenizer), len(tokenizer), most=None)
    for _, tokens in tokenised(documents, tokenizer):
        packer.add(tokens)
    return packer.sequences
