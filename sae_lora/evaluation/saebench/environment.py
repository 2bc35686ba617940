"""The environment that SAEBench runs in: its requirements, on top of this environment's packages.

It uses torch, transformers and SAELens of this environment, with which the run was trained. Other
requirements, above all older versions of NumPy and datasets, are installed into it. Imports no torch.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from sae_lora.common.console import say
from sae_lora.common.errors import UserError
from sae_lora.common.files import check_writable, write_atomically

VERSION = "0.6.0"
"""Version of SAEBench. In other versions, settings and results may have other names."""
COMMAND = "sae-lora setup saebench"
"""The command that makes the environment."""
_SHARED = ("torch", "transformers", "transformer-lens", "sae-lens", "peft", "safetensors")
"""Packages that are used from this environment, so that models and SAEs are bit-identical."""
_NOT_INSTALLED = {"torchvision", "openai", "sae-probes"}
"""Requirements of SAEBench that no benchmark here uses; some are gigabytes large."""
_MISSING_REQUIREMENT = "pyarrow<26"
"""A requirement that SAEBench does not state: later versions do not work with its NumPy."""
_LINES = 15
"""Number of lines of the log in an error message."""


def python(given: str | None) -> Path:
    """The Python of an environment with SAEBench: the given one, or else the one that `make` has made.

    Raises:
        UserError: If there is none, or it was made with other versions of packages.
    """
    if given is not None:
        if not (path := Path(given).expanduser()).is_file():
            raise UserError(f"evaluation.saebench_python = {given!r}: no such file")
        return path
    folder = _folder()
    if not _marker(folder).exists():
        raise UserError(f"SAEBench needs its own environment; create it with: {COMMAND}")
    if json.loads(_marker(folder).read_text()) != _shared():
        raise UserError(
            "SAEBench's environment was created for other versions of packages; create it again with: "
            f"{COMMAND}"
        )
    return _python(folder)


def make() -> Path:
    """Create the environment, over an older one, and return its folder.

    Raises:
        UserError: If the folder cannot be written, or packages cannot be downloaded or do not work.
    """
    folder = _folder()
    check_writable(folder.parent, "XDG_CACHE_HOME")
    log = folder / "setup.log"
    say(f"installing SAEBench {VERSION} into {folder}, on top of {sys.prefix}")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (packages / "beneath.pth").write_text("\n".join(_site_packages()) + "\n")
    install = [
        str(_python(folder)),
        *("-m", "pip", "install", "--no-compile", "--disable-pip-version-check"),
    ]
    _run([*install, "--no-deps", f"sae-bench=={VERSION}"], log)
    say("  installing its requirements, about 300 MB")
    _run([*install, _MISSING_REQUIREMENT, *_requirements(packages)], log)
    say("  checking that it works")
    _run([str(_python(folder)), "-m", "sae_lora.evaluation.saebench"], log, environment())
    write_atomically(_marker(folder), json.dumps(_shared()))
    return folder


def environment() -> dict[str, str]:
    """Environment variables for SAEBench's processes, which import this package.

    Type checks at run time are off, because SAEBench's annotations require a HookedTransformer.
    """
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAXTYPING_DISABLE": "1"}


def _folder() -> Path:
    """The folder of SAEBench's environment, on top of this one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    beneath = hashlib.sha256("\n".join(_site_packages()).encode()).hexdigest()[:8]
    return cache / "sae_lora" / f"saebench-{VERSION}-{beneath}"


def _marker(folder: Path) -> Path:
    return folder / "works.json"


def _python(folder: Path) -> Path:
    return Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)})) / "python"


def _site_packages() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


@functools.cache
def _shared() -> dict[str, str]:
    return {name: metadata.version(name) for name in _SHARED}


def _requirements(packages: Path) -> list[str]:
    """Requirements of SAEBench that must be installed."""
    (distribution,) = metadata.distributions(name="sae-bench", path=[str(packages)])
    requirements = [Requirement(line) for line in distribution.requires or []]
    by_name = {requirement.name.replace("_", "-").lower(): requirement for requirement in requirements}
    return [
        str(requirement)
        for name, requirement in by_name.items()
        if name not in {*_SHARED, *_NOT_INSTALLED}
        and (requirement.marker is None or requirement.marker.evaluate())
    ]


def _run(command: list[str], log: Path, variables: dict[str, str] | None = None) -> None:
    """Run a command with its output in a log file; if it fails, raise the end of the log."""
    with log.open("a") as printed:
        done = subprocess.run(command, stdout=printed, stderr=printed, env=variables, check=False)
    if done.returncode != 0:
        end = "\n".join(log.read_text(errors="replace").strip().splitlines()[-_LINES:])
        raise UserError(f"SAEBench's environment cannot be created; the end of {log}:\n{end}")
