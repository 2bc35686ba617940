"""The picture in the README holds: imports go one way, and each library has one room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sae_lora"
ORDER = [
    *(
        *("errors", "start"),
        "redaction",
        "choices",
        "evaluation_config",
        "config",
        "conversion",
        "identity",
        "lora_request",
        "evaluation_request",
        "checks",
        "files",
        *("records", "evaluation.record", "evaluation.headlines"),
        "curves",
        "lease",
        "tables",
        "reach",
        "terminal",
        "shown",
        "wandb_run",
        "tracking",
        "composition",
        "interruption",
        "hub",
        "dimensions",
    ),
    *(
        "data.documents",
        "data.packing",
        "data.corpus",
        "attention",
        "models",
        "splice",
        "head",
        "kl",
        "dropout",
        "lora",
    ),
    *("trunk", "student", "checkpoint", "learning", "workers", "metrics", "training", "loop"),
    "distill",
    *(
        "saes.disk",
        "results",
        "saes.table",
        "saes.registry",
        "saes.sparse",
        "output_adapter",
        "saes.new",
        "saes.loading",
        "saes.learner",
        "saes.buffer",
        "saes.trained",
        "saes.descent",
        "reconstruct",
        "saes.training",
        "methods",
        "grouping",
        "provenance",
        "estimate",
        "member",
        "progress",
        "assembly",
        "follower",
        "run",
        "slurm",
        "layer_groups",
        "plan",
        "prefetch",
        "places",
        "packs",
        "standing",
        "adapted",
        *("evaluation.bootstrap", "evaluation.subject", "evaluation.core"),
        *("evaluation.mechanism", "evaluation.pairs", "evaluation.similarity", "evaluation.overlap"),
        *("evaluation.weights", "evaluation.steering_texts", "evaluation.steered_models"),
        *("evaluation.tasks.reading", "evaluation.tasks.cutting", "evaluation.tasks.__main__"),
        *("evaluation.steering", "evaluation.harness"),
        "card",
        "export",
        *("evaluation.saebench.model", "evaluation.saebench.benchmarks", "evaluation.saebench.__main__"),
        *("evaluation.saebench.environment", "evaluation.saebench.suite"),
        "evaluation.suites",
        "push",
        "command",
        "scaling",
        "sweep",
        "figures",
        "grouping_figures",
        *("evaluation.drawn", "evaluation.similarity_figures"),
        "time_to_ce",
        "budget",
        "per_block",
        "group_table",
        "report",
        *("upload", "evaluation.__main__"),
        "dashboard",
        "watch",
        "job",
        "dispatch",
        "launcher",
    ),
    *("benchmark.reference", "benchmark.shapes", "benchmark.measure", "benchmark.memory"),
    *("benchmark.profile", "benchmark.compare"),
    *("embedded.language_model", "embedded.recipe", "embedded.__main__", "__main__"),
]
"""A module imports only modules that stand before it."""
ROOMS = {
    "peft": {"lora"},
    "wandb": {"wandb_run", "dashboard"},
    "wandb_workspaces": {"dashboard"},
    "submitit": {"job", "dispatch"},
    "hydra": {"composition"},
    "lm_eval": {"evaluation.harness"},
    "sae_bench": {"evaluation.saebench.benchmarks"},
}
"""The modules that may import a library."""
SAE_LENS = {
    "saes.loading",
    "saes.new",
    "saes.learner",
    "saes.trained",
    "saes.training",
    "benchmark.shapes",
    "evaluation.saebench.model",
    "evaluation.saebench.benchmarks",
}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Everything imported, also inside functions; `from a import b` counts as `a` and `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_place() -> None:
    assert {name for name in modules() if not name.endswith("__init__")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name: str) -> None:
    own = {f"sae_lora.{other}": other for other in ORDER}
    used = {own[imported] for imported in imports(modules()[name]) if imported in own}
    assert all(ORDER.index(other) < ORDER.index(name) for other in used), (name, used)


def test_each_library_has_one_room() -> None:
    for name, path in modules().items():
        roots = {imported.split(".")[0] for imported in imports(path)}
        for library, rooms in ROOMS.items():
            assert library not in roots or name in rooms, (name, library)
        assert "sae_lens" not in roots or name.startswith("saes.") or name in SAE_LENS, name


@pytest.mark.parametrize(
    "module",
    ["config", "records", "tables", "composition", "launcher", "terminal", "watch", "plan", "report"],
)
def test_planning_and_looking_need_no_torch(module: str) -> None:
    code = f"import sys, sae_lora.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_module_is_too_large_for_one_room() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert max(lengths.values()) < 450, lengths
