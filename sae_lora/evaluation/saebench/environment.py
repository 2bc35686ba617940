"""The environment that SAEBench runs in: packages that it needs, on top of this environment.

Torch, transformers and SAELens are those of this environment, with which the run was trained. Other
requirements, above all an older NumPy and datasets, are installed in the new one. Imports no torch.
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
"""Version of SAEBench; others may have other names of settings and results."""
COMMAND = "sae-lora setup saebench"
"""The command that makes the environment."""
_SHARED = ("torch", "transformers", "transformer-lens", "sae-lens", "peft", "safetensors")
"""Packages of this environment, so that models and SAEs are the same to the bit."""
_LEFT_OUT = {"torchvision", "openai", "sae-probes"}
"""Requirements of SAEBench, some of gigabytes, that no benchmark here uses."""
_UNSAID = "pyarrow<26"
"""A requirement that SAEBench does not state: later versions refuse its NumPy."""
_LINES = 15
"""Lines of the log in an error message."""


def python(given: str | None) -> Path:
    """The Python of an environment that has SAEBench: the user's own if given, else that of `make`.

    Raises:
        UserError: Where there is none; names the command that makes one.
    """
    if given is not None:
        if not (path := Path(given).expanduser()).is_file():
            raise UserError(f"evaluation.saebench_python = {given!r}: there is no such file")
        return path
    folder = _folder()
    if not _marker(folder).exists():
        raise UserError(f"SAEBench needs an environment of its own, which one command makes: {COMMAND}")
    if json.loads(_marker(folder).read_text()) != _shared():
        raise UserError(f"SAEBench's environment was made for other versions; make it anew: {COMMAND}")
    return _python(folder)


def make() -> Path:
    """Make the environment, in place of an older one, and return its folder.

    Raises:
        UserError: Where there is no room, or packages cannot be fetched or do not work together.
    """
    folder = _folder()
    check_writable(folder.parent, "XDG_CACHE_HOME")
    log = folder / "setup.log"
    say(f"SAEBench {VERSION} in {folder}, on top of {sys.prefix}")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (packages / "beneath.pth").write_text("\n".join(_site_packages()) + "\n")
    install = [str(_python(folder)), *("-m", "pip", "install", "--disable-pip-version-check")]
    _run([*install, "--no-deps", f"sae-bench=={VERSION}"], log)
    say("  what it needs, some 300 MB")
    _run([*install, _UNSAID, *_requirements(packages)], log)
    say("  whether it works")
    _run([str(_python(folder)), "-m", "sae_lora.evaluation.saebench"], log, environment())
    write_atomically(_marker(folder), json.dumps(_shared()))
    return folder


def environment() -> dict[str, str]:
    """Environment variables for its processes, which import this package.

    Type checks at run time are off, since SAEBench's annotations ask for a HookedTransformer.
    """
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAXTYPING_DISABLE": "1"}


def _folder() -> Path:
    """The folder for SAEBench on top of this environment."""
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
    """SAEBench's own requirements, without those that are shared or left out."""
    (distribution,) = metadata.distributions(name="sae-bench", path=[str(packages)])
    requirements = [Requirement(line) for line in distribution.requires or []]
    by_name = {each.name.replace("_", "-").lower(): each for each in requirements}
    return [
        str(requirement)
        for name, requirement in by_name.items()
        if name not in {*_SHARED, *_LEFT_OUT}
        and (requirement.marker is None or requirement.marker.evaluate())
    ]


def _run(command: list[str], log: Path, variables: dict[str, str] | None = None) -> None:
    """Run a command that prints into the log; where it fails, raise the end of the log."""
    with log.open("a") as printed:
        done = subprocess.run(command, stdout=printed, stderr=printed, env=variables, check=False)
    if done.returncode != 0:
        end = "\n".join(log.read_text(errors="replace").strip().splitlines()[-_LINES:])
        raise UserError(f"SAEBench's environment cannot be made; the end of {log}:\n{end}")
