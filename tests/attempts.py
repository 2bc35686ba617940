"""One attempt at a run in a process of its own, which something befalls at a chosen step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from sae_lora.plan import plan
from sae_lora.records import RunFolder
from tests.commands import REPOSITORY
from tests.composing import composed

_SCRIPT = """
import os, shutil, sys
import torch
from sae_lora import checkpoint, run
from sae_lora.training import Training

step, what = int(sys.argv.pop(1)), sys.argv.pop(1)
learn, save_file = Training.learn, checkpoint.save_file

def befall():
    if what == "exit":
        os._exit(17)
    if what == "raise":
        raise ZeroDivisionError("befallen")
    if what == "memory":
        raise torch.OutOfMemoryError("no room")
    if what == "delete":
        shutil.rmtree(sys.argv[1])
        return
    os.kill(os.getpid(), int(what))

befallen = False

def learning(training, hidden, kl):
    global befallen
    if training.step == step - 1 and not befallen:
        befallen = True
        if what == "optimizer":
            take_step = training._optimizer.step
            training._optimizer.step = lambda: (take_step(), torch.empty(10**16))
        else:
            befall()
    learn(training, hidden, kl)

def saving(tensors, path):
    save_file(tensors, path)
    if f"step-{-step:08d}" in str(path):
        befall()

Training.learn = learning
checkpoint.save_file = saving
sys.exit(run.main())
"""


def frozen(home: Path, *overrides: str) -> RunFolder:
    """The folder of a run of the embedded default as it is when a job begins: its config alone."""
    config = composed(
        *overrides, "tracking=disabled", f"output_dir={home}", f"data.cache_dir={home}/cache"
    )
    (planned,) = plan([config]).runs
    planned.freeze()
    return planned.folder


def attempt(
    *folders: RunFolder, step: int = 0, what: str | int = ""
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m sae_lora.run` to its end, whatever that is.

    Args:
        folders: The run folders.
        step: Step in which something happens; negative: while the checkpoint of that step is
            written; 0: nothing happens.
        what: A signal's number that the process sends itself, `exit`, or what is raised in one run:
            `raise` for any error, `memory` for too little of it; `optimizer` for that at the
            end of an optimiser's step; or `delete` for the folder of the first run.
    """
    paths = [str(folder.path) for folder in folders]
    command = [sys.executable, "-c", _SCRIPT, str(step or 10**9), str(what), *paths]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def killed(finished: subprocess.CompletedProcess[str]) -> bool:
    """Whether the process ended by SIGKILL."""
    return finished.returncode == -signal.SIGKILL


def results(folder: RunFolder) -> dict[str, object]:
    """What a run found, without how long it took and where."""
    curve = [
        {
            name: value
            for name, value in vars(point).items()
            if name not in ("train_seconds", "tokens_per_second")
        }
        for point in folder.read_curve()
    ]
    adapter = load_file(folder.adapter / "adapter_model.safetensors")
    return {"curve": curve} | {name: value.tolist() for name, value in adapter.items()}
