"""SAEBench's benchmarks of a run's SAEs, with the adapted model in the place of the plain one."""

import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lora.common.console import complain, say
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.enums import Suite
from sae_lora.config.evaluation import BENCHMARKS, EvaluationConfig
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.saebench import environment
from sae_lora.evaluation.subject import Subject
from sae_lora.saes.loading import IdentitySAE
from sae_lora.saes.output_adapter import AdaptedCoder

HEEDS = ("saebench", "saebench_options")
"""The keys of `evaluation` that it depends on."""
_CHILD = "sae_lora.evaluation.saebench"
_NO_NUMBER = -1
"""What SAEBench writes where it has none."""


@dataclass(frozen=True)
class SAEBench:
    """The suite `saebench`."""

    version: str
    """Of SAEBench."""
    scores: dict[str, dict[str, dict[str, dict[str, float]]]]
    """SAEBench's metrics by hookpoint, benchmark and cell: `spliced` is the plain model and the SAE as
    it was, `student` the model and the SAE as the run has left them."""
    missing: dict[str, str]
    """What could not be taken, and why: it is asked for again."""


def check(config: EvaluationConfig) -> None:
    """Says, before a model is loaded, what benchmarks lack.

    Args:
        config: Which.

    Raises:
        ConfigError: Where none is asked for.
        UserError: Where there is no environment with SAEBench, or none of them can be taken.
    """
    if not config.saebench:
        raise ConfigError("evaluation.saebench", [], "at least one benchmark", list(BENCHMARKS[:1]))
    _, lacking = _asked(config)
    if len(lacking) == len(config.saebench):
        raise UserError("\n".join(f"{name}: {why}" for name, why in lacking.items()))
    for name, why in lacking.items():
        complain(f"saebench's {name} left out", why)


def score(subject: Subject, config: EvaluationConfig) -> SAEBench:
    """Has the benchmarks taken, in the environment that has SAEBench.

    SAEBench's own files are kept in the run's `evaluation/saebench`. What is there already, since it was
    stopped or something was missing then, is not taken again.

    Args:
        subject: The run.
        config: Which benchmarks, and their settings.

    Raises:
        UserError: Where there is no environment with SAEBench; or for SAEs that are not SAELens's alone.
    """
    for splice in subject.after:
        if isinstance(splice.sae, AdaptedCoder | IdentitySAE):
            raise UserError(
                f"SAEBench measures SAEs of SAELens alone, not the {type(splice.sae).__name__} at "
                f"{splice.hookpoint}"
            )
    folder = subject.folder.evaluation / "saebench"
    python, lacking = _asked(config)
    _begin(subject, folder, config)
    say(f"  SAEBench, which says more in {folder / 'saebench.log'}")
    request = {
        "run": str(subject.folder.path.absolute()),
        "device": subject.device.type,
        "benchmarks": [name for name in config.saebench if name not in lacking],
        "options": _options(config),
        "to": str(folder.absolute()),
    }
    _run(python, request, folder)
    failed = json.loads((folder / "failed.json").read_text())
    return SAEBench(environment.VERSION, _scores(folder), lacking | failed)


def _asked(config: EvaluationConfig) -> tuple[Path, dict[str, str]]:
    """The Python that has SAEBench, and what stands against the benchmarks, by name."""
    python = environment.python(config.saebench_python)
    return python, _lacking(
        python, json.dumps({"benchmarks": config.saebench, "options": _options(config)})
    )


def _options(config: EvaluationConfig) -> dict[str, Any]:
    return config.saebench_options or {}


@functools.lru_cache(maxsize=2)
def _lacking(python: Path, request: str) -> dict[str, str]:
    """What stands against the benchmarks of a request, by name."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(request)
        file.flush()
        found = subprocess.run(
            [str(python), "-m", _CHILD, file.name],
            capture_output=True,
            text=True,
            env=environment.environment(),
            check=False,
        )
    if found.returncode != 0:
        end = "\n".join(found.stderr.strip().splitlines()[-5:])
        raise UserError(
            f"{python} cannot run SAEBench; what makes an environment that can is "
            f"{environment.COMMAND}:\n{end}"
        )
    return json.loads(found.stdout.splitlines()[-1])


def _begin(subject: Subject, folder: Path, config: EvaluationConfig) -> None:
    """Makes the folder, or leaves what is in it where that is part of what is asked for now."""
    wanted = {name: getattr(config, name) for name in HEEDS}
    settings = folder / "settings.json"
    there = suite_records.read(subject.folder, Suite.saebench)
    ended = there is not None and not there.results["missing"]
    if ended or not settings.exists() or json.loads(settings.read_text()) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(settings, as_json(wanted))


def _run(python: Path, request: Mapping[str, Any], folder: Path) -> None:
    """Has the child take the benchmarks; passes on what it says.

    Raises:
        UserError: Where it does not come to its end.
    """
    asked, log = folder / "request.json", folder / "saebench.log"
    write_atomically(asked, as_json(dict(request)))
    with (
        log.open("a") as printed,
        subprocess.Popen(
            [str(python), "-m", _CHILD, str(asked)],
            stdout=subprocess.PIPE,
            stderr=printed,
            text=True,
            env=environment.environment(),
        ) as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                say(line.rstrip())
        except BaseException:
            child.kill()
            raise
    asked.unlink()
    if child.returncode != 0:
        raise UserError(f"SAEBench has stopped with exit code {child.returncode}; {log} says why")


def _scores(folder: Path) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for file in sorted(folder.glob("* * *.json")):
        benchmark, cell, hookpoint = file.stem.split(" ")
        categories = json.loads(file.read_text())["eval_result_metrics"]
        found.setdefault(hookpoint, {}).setdefault(benchmark, {})[cell] = {
            name: value
            for metrics in categories.values()
            for name, value in metrics.items()
            if isinstance(value, int | float) and value != _NO_NUMBER
        }
    return found
