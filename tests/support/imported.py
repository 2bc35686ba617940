"""Imports what commands and runs need, so that processes that are forked afterwards need not."""

import importlib

from sae_lora.common.lazy_imports import import_quickly

import_quickly()
for name in ("launcher.launch", "launcher.prefetch", "run.execute", "run.together"):
    importlib.import_module(f"sae_lora.{name}")
for name in ("gemma2", "gpt2", "gpt_neox", "llama"):
    importlib.import_module(f"transformers.models.{name}.modeling_{name}")
for name in ("commands", "forked_jobs"):
    importlib.import_module(f"tests.support.{name}")
