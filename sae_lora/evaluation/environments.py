"""Environments of their own for libraries that need other versions of packages than this one.

Such an environment lies on top of this one: it uses torch of this environment, and other packages that
must be the same, and has its own versions of the rest. Imports no torch.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from sae_lora.common.console import say
from sae_lora.common.errors import UserError
from sae_lora.common.files import check_writable, write_atomically

_LINES = 15
"""Number of lines of the log in an error message."""


@dataclass(frozen=True)
class Environment:
    """The environment of a suite, made by `sae-lora setup <suite>`."""

    suite: str
    name: str
    """The library's name, for messages."""
    package: str
    version: str
    """Its version. In other versions, settings and results may have other names."""
    shared: Sequence[str]
    """Packages that are used from this environment, so that models and SAEs are bit-identical."""
    not_installed: Sequence[str]
    """Requirements of the library that the suite does not use."""
    pinned: Mapping[str, str]
    """Versions of requirements, by package, that the library does not state, and needs."""
    megabytes: int
    """About the size of its downloads."""
    variables: Mapping[str, str]
    """Environment variables of its processes."""

    @property
    def command(self) -> str:
        """The command that makes the environment."""
        return f"sae-lora setup {self.suite}"

    @property
    def module(self) -> str:
        """The module that runs in the environment; without arguments it checks that it can run."""
        return f"sae_lora.evaluation.{self.suite}"

    def python(self, given: str | None) -> Path:
        """The Python of an environment: the given one, or else that of the one that `make` has made.

        Raises:
            UserError: If there is none, or it was made with other versions of packages.
        """
        if given is not None:
            if not (path := Path(given).expanduser()).is_file():
                raise UserError(f"evaluation.{self.suite}_python = {given!r}: no such file")
            return path
        if not self._marker.exists():
            raise UserError(f"{self.name} needs its own environment; create it with: {self.command}")
        if json.loads(self._marker.read_text()) != _versions(tuple(self.shared)):
            raise UserError(
                f"{self.name}'s environment was created for other versions of packages; create it again "
                f"with: {self.command}"
            )
        return _python(self._folder)

    def make(self) -> Path:
        """Create the environment, over an older one, and return its folder.

        Raises:
            UserError: If the folder cannot be written, or packages cannot be downloaded or do not work.
        """
        folder = self._folder
        check_writable(folder.parent, "XDG_CACHE_HOME")
        log = folder / "setup.log"
        say(f"installing {self.name} {self.version} into {folder}, on top of {sys.prefix}")
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (packages / "beneath.pth").write_text("\n".join(_site_packages()) + "\n")
        install = [
            str(_python(folder)),
            *("-m", "pip", "install", "--no-compile", "--disable-pip-version-check"),
        ]
        self._run([*install, "--no-deps", f"{self.package}=={self.version}"], log)
        say(f"  installing its requirements, about {self.megabytes} MB")
        self._run([*install, *self._requirements(packages)], log)
        say("  checking that it works")
        self._run([str(_python(folder)), "-m", self.module], log, self.environment())
        write_atomically(self._marker, json.dumps(_versions(tuple(self.shared))))
        return folder

    def environment(self) -> dict[str, str]:
        """Environment variables for processes, which import this package."""
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
        return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **self.variables}

    @property
    def _folder(self) -> Path:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        beneath = hashlib.sha256("\n".join(_site_packages()).encode()).hexdigest()[:8]
        return cache / "sae_lora" / f"{self.suite}-{self.version}-{beneath}"

    @property
    def _marker(self) -> Path:
        return self._folder / "works.json"

    def _requirements(self, packages: Path) -> list[str]:
        """Requirements of the library that must be installed."""
        (distribution,) = metadata.distributions(name=self.package, path=[str(packages)])
        requirements = [Requirement(line) for line in distribution.requires or []]
        by_name = {each.name.replace("_", "-").lower(): each for each in requirements}
        left_out = {*self.shared, *self.not_installed, *self.pinned}
        return [
            *(f"{name}{version}" for name, version in self.pinned.items()),
            *(
                str(requirement)
                for name, requirement in by_name.items()
                if name not in left_out and (requirement.marker is None or requirement.marker.evaluate())
            ),
        ]

    def _run(self, command: list[str], log: Path, variables: dict[str, str] | None = None) -> None:
        """Run a command with its output in a log file; if it fails, raise the end of the log."""
        with log.open("a") as printed:
            done = subprocess.run(command, stdout=printed, stderr=printed, env=variables, check=False)
        if done.returncode != 0:
            end = "\n".join(log.read_text(errors="replace").strip().splitlines()[-_LINES:])
            raise UserError(f"{self.name}'s environment cannot be created; the end of {log}:\n{end}")


def _python(folder: Path) -> Path:
    return Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)})) / "python"


def _site_packages() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


@functools.cache
def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {name: metadata.version(name) for name in packages}


SAEBENCH = Environment(
    "saebench",
    name="SAEBench",
    package="sae-bench",
    version="0.6.0",
    shared=("torch", "transformers", "transformer-lens", "sae-lens", "peft", "safetensors"),
    not_installed=("torchvision", "openai", "sae-probes"),  # some are gigabytes large
    pinned={"pyarrow": "<26"},  # later versions do not work with its NumPy
    megabytes=300,
    variables={"JAXTYPING_DISABLE": "1"},  # its annotations require a HookedTransformer
)
CIRCUITS = Environment(
    "circuits",
    name="circuit-tracer",
    package="circuit-tracer",
    version="0.5.0",
    shared=("torch", "safetensors"),
    not_installed=(),
    pinned={"nnsight": ">=0.6,<0.7"},  # 0.7 moved modules that it imports
    megabytes=100,
    variables={"HF_HUB_OFFLINE": "1"},  # models and transcoders are in folders
)
BY_SUITE = {each.suite: each for each in (SAEBENCH, CIRCUITS)}
