"""The suite `saebench`: SAEBench's benchmarks of a run's SAEs, before and after the run."""

import functools
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lora.common.console import complain, say
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.enums import Suite
from sae_lora.config.execution import BENCHMARKS, EvaluationConfig
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.environments import SAEBENCH
from sae_lora.evaluation.subject import Subject
from sae_lora.saes.loading import IdentitySAE
from sae_lora.saes.output_adapter import AdaptedCoder

DEPENDS_ON = ("saebench", "saebench_options")
"""The keys of `evaluation` that the suite depends on."""
_NO_NUMBER = -1
"""SAEBench's value for a missing score."""


@dataclass(frozen=True)
class SAEBench:
    """Results of the suite `saebench`."""

    version: str
    """Version of SAEBench."""
    scores: dict[str, dict[str, dict[str, dict[str, float]]]]
    """SAEBench's metrics by hookpoint, benchmark and cell: `spliced` is the plain model with the SAE
    before the run, `student` the adapted model with the SAE after the run."""
    missing: dict[str, str]
    """Reasons of the benchmarks that failed; the next evaluation runs them again."""


def check(config: EvaluationConfig) -> None:
    """Report the benchmarks that cannot run, before a model is loaded.

    Raises:
        ConfigError: If `evaluation.saebench` is empty.
        UserError: If there is no environment with SAEBench, or no benchmark can run.
    """
    if not config.saebench:
        raise ConfigError("evaluation.saebench", [], "at least one benchmark", list(BENCHMARKS[:1]))
    lacking = _lacking(SAEBENCH.python(config.saebench_python), json.dumps(_request(config)))
    if len(lacking) == len(config.saebench):
        raise UserError("\n".join(f"{name}: {reason}" for name, reason in lacking.items()))
    for name, reason in lacking.items():
        complain(f"skipped {name} of saebench", reason)


def score(subject: Subject, config: EvaluationConfig) -> SAEBench:
    """Run the benchmarks in SAEBench's environment.

    SAEBench's files are written into the run's `evaluation/saebench`. If an earlier attempt with the
    same settings was stopped or incomplete, its results are reused.

    Raises:
        UserError: If there is no environment with SAEBench, or an SAE is not a plain SAE of SAELens.
    """
    for splice in subject.after:
        if splice.reads is not None or isinstance(splice.sae, AdaptedCoder | IdentitySAE):
            kind = type(splice.sae).__name__ if splice.reads is None else "transcoder"
            raise UserError(
                f"SAEBench measures only SAEs of SAELens, not the {kind} at {splice.hookpoint}"
            )
    folder = subject.folder.evaluation / "saebench"
    python, request = SAEBENCH.python(config.saebench_python), _request(config)
    lacking = _lacking(python, json.dumps(request))
    _begin(subject, folder, config)
    say(f"  SAEBench, with its log in {folder / 'saebench.log'}")
    request |= {
        "run": str(subject.folder.path.absolute()),
        "device": subject.device.type,
        "benchmarks": [name for name in config.saebench if name not in lacking],
        "to": str(folder.absolute()),
    }
    _run(python, request, folder)
    failed = json.loads((folder / "failed.json").read_text())
    return SAEBench(SAEBENCH.version, _scores(folder), lacking | failed)


def _request(config: EvaluationConfig) -> dict[str, Any]:
    return {"benchmarks": config.saebench, "options": config.saebench_options or {}}


@functools.lru_cache(maxsize=2)
def _lacking(python: Path, request: str) -> dict[str, str]:
    """Reasons for the benchmarks of a request that cannot run."""
    done = subprocess.run(
        [str(python), "-m", SAEBENCH.module, request],
        capture_output=True,
        text=True,
        env=SAEBENCH.environment(),
        check=False,
    )
    if done.returncode != 0:
        end = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise UserError(
            f"{python} cannot run SAEBench; create an environment for it with {SAEBENCH.command}:\n{end}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _begin(subject: Subject, folder: Path, config: EvaluationConfig) -> None:
    """Make the folder; empty it unless it contains an unfinished attempt with the same settings."""
    current = {name: getattr(config, name) for name in DEPENDS_ON}
    settings = folder / "settings.json"
    record = suite_records.read(subject.folder, Suite.saebench)
    complete = record is not None and not record.results["missing"]
    if complete or not settings.exists() or json.loads(settings.read_text()) != current:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(settings, as_json(current))


def _run(python: Path, request: dict[str, Any], folder: Path) -> None:
    """Run the benchmarks in a child process and repeat its output."""
    log = folder / "saebench.log"
    with (
        log.open("a") as printed,
        subprocess.Popen(
            [str(python), "-m", SAEBENCH.module, json.dumps(request)],
            stdout=subprocess.PIPE,
            stderr=printed,
            text=True,
            env=SAEBENCH.environment(),
        ) as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                say(line.rstrip())
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise UserError(f"SAEBench exited with code {child.returncode}; see {log}")


def _scores(folder: Path) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    scores: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for file in sorted(folder.glob("* * *.json")):
        benchmark, cell, hookpoint = file.stem.split(" ")
        categories = json.loads(file.read_text())["eval_result_metrics"]
        scores.setdefault(hookpoint, {}).setdefault(benchmark, {})[cell] = {
            name: value
            for metrics in categories.values()
            for name, value in metrics.items()
            if isinstance(value, int | float) and value != _NO_NUMBER
        }
    return scores
