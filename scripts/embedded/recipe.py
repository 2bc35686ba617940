"""The recipe of the embedded tokenizer, language model and SAEs, all from the standard library.

Results are determined by the seed, on one kind of machine with the same number of threads.
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
from sae_lora.data.packing import Packer, convention_of, shuffled_batches, special_ids, tokenised
from sae_lora.models.loading import load_model, load_tokenizer
from sae_lora.splice.positions import Special
from scripts.embedded import language_model
from scripts.embedded.saes import SAEBudget, TopKRequest, train_topk
from scripts.embedded.transcoders import make_transcoders

VOCABULARY = 2048
CONTEXT_LENGTH = 128
VALIDATION_SHARE = 0.1
"""The default of `data.validation_share`, so that runs hold out the same documents."""

BLOCKS = range(1, 7)
SPARSITIES = (4, 8, 16, 32)
WIDTHS = (256, 512, 2048, 4096)


def requests() -> dict[str, TopKRequest]:
    """The embedded SAEs by name: every sparsity at every block, and every width at block 3."""
    saes = [TopKRequest(block, 1024, k) for block in BLOCKS for k in SPARSITIES]
    saes += [TopKRequest(3, width, 8) for width in WIDTHS]
    return {f"block_{sae.block}-width_{sae.width}-l0_{sae.k}": sae for sae in saes}


def make_model(folder: Path, budget: language_model.Budget, seed: int) -> None:
    """Train tokenizer and language model and write them in transformers' format, in bfloat16."""
    train, validation = _documents(seed)
    tokenizer = language_model.train_tokenizer((document.text for document in train), VOCABULARY)
    # A model of this size memorises the library's 2M tokens in a few passes, so its tests are added.
    tests = [document for document in stdlib_documents(tests=True) if not _held_out(document)]
    sequences = _packed(shuffled([*train, *tests], seed), tokenizer)
    held_out = _packed(validation, tokenizer)
    console.print(
        f"{len(train):,} documents of the library and {len(tests):,} of its tests: "
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


_METADATA = {
    "model_name": "tiny",
    "dataset_path": "the Python standard library",
    "context_size": CONTEXT_LENGTH,
    "prepend_bos": True,
}


def make_saes(folder: Path, model_folder: Path, budget: SAEBudget, seed: int) -> None:
    """Train SAEs and transcoders, and write them in sae-lens's format, in float16."""
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
        metadata=_METADATA,
        # The residual stream at BOS has ten times the norm of other positions. An SAE that must also
        # reconstruct it learns little else, and its FVU is then dominated by BOS.
        special=Special(special_ids(tokenizer)),
    )
    for name, sae in trained.items():
        sae.to("cpu", torch.float16).save_inference_model(folder / name)
    make_transcoders_of(folder, model_folder, budget, seed)


def make_transcoders_of(folder: Path, model_folder: Path, budget: SAEBudget, seed: int) -> None:
    """Train a transcoder for every block, and write them in sae-lens's format, in float16."""
    config = ModelConfig(name=str(model_folder))
    model = load_model(config, DType.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(config)
    batches = shuffled_batches(_packed(_documents(seed)[0], tokenizer), 16, seed)
    set_seed(seed)
    special = Special(special_ids(tokenizer))
    metadata = _METADATA | {"exclude_special_tokens": True}
    twice = budget._replace(tokens=2 * budget.tokens)  # they are quick to train, and learn slowly
    make_transcoders(folder, model, iter(batches), twice, metadata=metadata, special=special, seed=seed)


def make(folder: Path, budget: language_model.Budget, sae_budget: SAEBudget, seed: int) -> None:
    """Make model and SAEs in a new folder, which replaces the old one at the end."""
    unfinished = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_model(unfinished / "model", budget, seed)
    make_saes(unfinished / "saes", unfinished / "model", sae_budget, seed)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def _documents(seed: int) -> tuple[list[Document], list[Document]]:
    """The library's documents for training, and its held-out documents."""
    train: list[Document] = []
    validation: list[Document] = []
    for document in shuffled(stdlib_documents(), seed):
        (validation if _held_out(document) else train).append(document)
    return train, validation


def _held_out(document: Document) -> bool:
    return in_validation(document.key, VALIDATION_SHARE)


def _packed(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    packer = Packer(CONTEXT_LENGTH, convention_of(tokenizer), most=None)
    for _, tokens in tokenised(documents, tokenizer):
        packer.add(tokens)
    return packer.sequences
