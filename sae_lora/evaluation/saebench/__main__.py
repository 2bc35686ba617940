"""SAEBench on a run's models and SAEs: `python -m sae_lora.evaluation.saebench <request as JSON>`.

It runs in SAEBench's environment (`environments.py`). Without a request it only checks the imports.
"""

import contextlib
import json
import random
import shutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_lora.common.files import write_atomically
from sae_lora.evaluation.saebench import benchmarks
from sae_lora.evaluation.saebench.model import Pair, have_same_input, pairs
from sae_lora.evaluation.subject import Subject
from sae_lora.records.folder import RunFolder


def evaluate(request: Mapping[str, Any]) -> None:
    """Run the benchmarks that have no result yet, and print the name of each.

    Failures are written to `failed.json`, and do not stop the other benchmarks.

    Args:
        request: `run`, `device`, `benchmarks`, `options`, and `to`, the folder for SAEBench's own
            results, `<benchmark> <cell> <hookpoint>.json`.
    """
    to = Path(request["to"])
    subject = Subject(RunFolder(Path(request["run"])), request["device"])
    failed: dict[str, str] = {}
    for hookpoint in [splice.hookpoint for splice in subject.after]:
        by_cell = pairs(subject, hookpoint)
        same = have_same_input(by_cell)
        for benchmark in request["benchmarks"]:
            files = {cell: to / f"{benchmark} {cell} {hookpoint}.json" for cell in by_cell}
            once = same and benchmark in benchmarks.NEED_ONLY_ACTIVATIONS
            for cell in list(by_cell)[: 1 if once else None]:
                if files[cell].exists():
                    continue
                print(f"  {benchmark}, {cell}, {hookpoint}", flush=True)
                options = request["options"].get(benchmark, {})
                try:
                    write_atomically(files[cell], _result(benchmark, by_cell[cell], options, to))
                except Exception as error:  # SAEBench may raise anything
                    failed[f"{benchmark}, {cell}, {hookpoint}"] = _reported(error)
            first, *copies = files.values()
            for copy in copies if once and first.exists() else ():
                write_atomically(copy, first.read_text())
    shutil.rmtree(to / "scratch", ignore_errors=True)
    write_atomically(to / "failed.json", json.dumps(failed))


def check(request: Mapping[str, Any]) -> dict[str, str]:
    """Reasons for the benchmarks of a request that cannot run: an unknown setting, or missing data."""
    lacking = {}
    for name in request["benchmarks"]:
        try:
            benchmarks.check(name, request["options"].get(name, {}))
        except Exception as error:  # the hub, a data set or a setting may raise anything
            lacking[name] = _reported(error)
    return lacking


def _result(benchmark: str, pair: Pair, options: Mapping[str, Any], to: Path) -> str:
    """Run a benchmark and return SAEBench's own file of results, as text."""
    scratch = to / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with (to / "saebench.log").open("a") as log:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 SAEBench uses this generator
        torch.manual_seed(0)
        torch.set_grad_enabled(True)
        log.write(f"\n{benchmark}, {pair.name}, {pair.splice.hookpoint}\n")
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            benchmarks.RUN[benchmark](pair, options, scratch)
    results = list(scratch.rglob("*_eval_results.json"))
    if len(results) != 1:
        raise RuntimeError(f"SAEBench gives no result; see {log.name}")
    return results[0].read_text()


def _reported(error: Exception) -> str:
    """Print the traceback and return the error in one line."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def main(arguments: list[str]) -> None:
    """Run or check the benchmarks of a request."""
    if not arguments:
        return
    request = json.loads(arguments[0])
    if "run" in request:
        evaluate(request)
    else:
        print(json.dumps(check(request)))


if __name__ == "__main__":
    main(sys.argv[1:])
