"""The rooms of docs/architecture.md: the order of imports, and the rooms that may import a library."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sae_lora"
ARCHITECTURE = (PACKAGE.parent / "docs/architecture.md").read_text()
FLOORS: list[set[str]] = [
    {"common"},
    {"config"},
    {"records", "data", "models"},
    {"splice"},
    {"saes"},
    {"saes.training"},
    {"train"},
    {"export"},
    {"evaluation"},
    {"tracking"},
    {"run"},
    {"report"},
    {"comparisons", "launcher"},
]
"""Floors of rooms, from the ground up. A room imports only rooms of lower floors."""
ARTEFACTS = "embedded"
"""The folder of the embedded model and SAEs; it imports nothing."""
MAX_MODULES = 12
LIBRARIES = {
    "peft": {"models"},
    "wandb": {"tracking"},
    "wandb_workspaces": {"tracking"},
    "submitit": {"launcher"},
    "hydra": {"config"},
    "lm_eval": {"evaluation"},
    "sae_bench": {"evaluation"},
    "sae_lens": {"saes", "saes.training", "evaluation"},
}
"""The rooms that may import a library."""
NO_TORCH = ("common", "config", "records", "report", "comparisons")
"""Rooms that import no torch; `launcher` imports it when it must, and is tested as a whole."""


@cache
def modules() -> dict[str, Path]:
    """The file of every module, by its dotted name without `sae_lora`."""
    paths = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        paths[".".join(part for part in parts if part != "__init__")] = path
    return paths


def room_of(module: str) -> str | None:
    """The innermost room of a module; `None` if it is in no room."""
    rooms = [room for floor in FLOORS for room in floor]
    inside = [room for room in rooms if module == room or module.startswith(f"{room}.")]
    return max(inside, key=len, default=None)


@cache
def imports(path: Path) -> frozenset[str]:
    """All imports of a file, also inside functions; `from a import b` counts as `a` and `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def imported_modules(path: Path) -> set[str]:
    """The modules of this package that a file imports, without packages."""
    inside = {name.removeprefix("sae_lora.") for name in imports(path) if name.startswith("sae_lora.")}
    return {name for name in inside if name in modules() and modules()[name].stem != "__init__"}


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=lambda floor: "+".join(sorted(FLOORS[floor])))
def test_imports_go_one_way_between_rooms(floor: int) -> None:
    below = set().union(*FLOORS[:floor])
    for name, path in modules().items():
        if (room := room_of(name)) in FLOORS[floor]:
            for imported in imported_modules(path):
                is_below = room_of(imported) in {room, *below}
                assert is_below or imported.startswith(ARTEFACTS), (name, imported)


def test_the_picture_shows_what_rooms_import() -> None:
    """An arrow for every import between rooms, unless other arrows lead to the same room."""
    edges: dict[str, set[str]] = {}
    for name, path in modules().items():
        if (room := room_of(name)) is not None:
            targets = {room_of(imported) for imported in imported_modules(path)}
            edges.setdefault(room, set()).update(target for target in targets - {room} if target)

    def reached(room: str) -> set[str]:
        return edges.get(room, set()).union(*map(reached, edges.get(room, set())))

    needed = {
        (room, target)
        for room, targets in edges.items()
        for target in targets
        if not any(target in reached(between) for between in targets)
    }
    arrows = re.findall(r"^  ([a-z.]+) --> ([a-z.]+)$", ARCHITECTURE, re.MULTILINE)
    assert len(arrows) == len(set(arrows)) and set(arrows) == needed


def test_the_page_names_every_module() -> None:
    for name, path in modules().items():
        if path.stem not in ("__init__", "__main__") and (room := room_of(name)) is not None:
            part = ARCHITECTURE.split(f"### `{room.split('.')[0]}/`")[1].split("\n### ")[0]
            assert f"{path.name}`" in part, name


def test_no_folder_holds_more_than_a_dozen_modules() -> None:
    for folder in {path.parent for path in modules().values()}:
        names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(names) <= MAX_MODULES or folder == PACKAGE, (folder, sorted(names))


def test_each_library_has_its_rooms() -> None:
    for name, path in modules().items():
        if (room := room_of(name)) is not None:
            roots = {imported.split(".")[0] for imported in imports(path)}
            for library, rooms in LIBRARIES.items():
                assert library not in roots or room in rooms, (name, library)


def test_planning_and_reports_need_no_torch() -> None:
    names = [
        f"sae_lora.{name}"
        for name in sorted(modules())
        if (room_of(name) in NO_TORCH or name.startswith("launcher.")) and "__main__" not in name
    ]
    without = [name for name in names if not name.endswith(("launcher.prefetch", "common.provenance"))]
    code = f"import sys, {', '.join(without)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_module_is_too_long() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert max(lengths.values()) < 450, lengths
