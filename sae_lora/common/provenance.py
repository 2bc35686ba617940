"""The machine, the package versions and the commit with which a result was computed."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("transformers", "peft", "sae-lens", "datasets", "wandb", "hydra-core")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads, host and the commit of this code, as plain values."""
    return {
        "sae_lora": metadata.version("sae_lora"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        # torch.__version__ also names the CUDA build, unlike the metadata of the package.
        "packages": {"torch": torch.__version__} | {name: metadata.version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
    }


def _git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files differ from it; `None` outside git."""
    module = Path(__file__)
    package = module.parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        # If git does not track this file, the commit belongs to another project.
        git("ls-files", "--error-unmatch", str(module.relative_to(package)))
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("-dirty" if git("status", "--porcelain", "--", ".").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
