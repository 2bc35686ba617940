"""The environment that SAEBench runs in: this one, with the versions that SAEBench needs laid over it.

What of SAEBench's needs is here already is used as it is: torch, transformers and SAELens are the ones
that the run was trained with. The rest, an older NumPy and datasets above all, is installed beside.
Imports no torch.
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
"""Of SAEBench: later ones may name their benchmarks' settings and results otherwise."""
COMMAND = "python -m sae_lora setup saebench"
"""What makes the environment."""
_SHARED = ("torch", "transformers", "transformer-lens", "sae-lens", "peft", "safetensors")
"""What is taken from this environment: models and SAEs are to be the same to the bit."""
_LEFT_OUT = {"torchvision", "openai", "sae-probes"}
"""What SAEBench names besides and none of the benchmarks here uses: some of it takes gigabytes."""
_UNSAID = "pyarrow<26"
"""Later ones refuse the NumPy that SAEBench asks for."""
_LINES = 15


def python(given: str | None) -> Path:
    """The Python of an environment that has SAEBench.

    Args:
        given: Of the user's own, if any.

    Raises:
        UserError: Where there is none; says what makes one.
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
    """Makes the environment, in the place of an older one.

    Returns:
        Its folder.

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
    _do([*install, "--no-deps", f"sae-bench=={VERSION}"], log)
    say("  what it needs, some 300 MB")
    _do([*install, _UNSAID, *_requirements(packages)], log)
    say("  whether it works")
    _do([str(_python(folder)), "-m", "sae_lora.evaluation.saebench"], log, environment())
    write_atomically(_marker(folder), json.dumps(_shared()))
    return folder


def environment() -> dict[str, str]:
    """Variables of a process in it: it imports this very package.

    And SAEBench takes models that are no HookedTransformer, which nothing but its annotations asks for.
    """
    package = str(Path(__file__).parents[3])
    others = os.environ.get("PYTHONPATH")
    path = package if not others else f"{package}{os.pathsep}{others}"
    return os.environ | {"PYTHONPATH": path, "JAXTYPING_DISABLE": "1"}


def _folder() -> Path:
    """One for each environment that it lies over."""
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
    """What SAEBench itself says that it needs, as far as that is to be installed."""
    (found,) = metadata.distributions(name="sae-bench", path=[str(packages)])
    every = [Requirement(one) for one in found.requires or []]
    named = {one.name.replace("_", "-").lower(): one for one in every}
    return [
        str(requirement)
        for name, requirement in named.items()
        if name not in {*_SHARED, *_LEFT_OUT}
        and (requirement.marker is None or requirement.marker.evaluate())
    ]


def _do(command: list[str], log: Path, variables: dict[str, str] | None = None) -> None:
    """Runs a command that prints into the log.

    Raises:
        UserError: Where it fails, with the end of the log.
    """
    with log.open("a") as printed:
        code = subprocess.run(
            command, stdout=printed, stderr=printed, env=variables, check=False
        ).returncode
    if code != 0:
        end = "\n".join(log.read_text(errors="replace").strip().splitlines()[-_LINES:])
        raise UserError(f"SAEBench's environment cannot be made; the end of {log}:\n{end}")
