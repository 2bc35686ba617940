"""Large libraries are imported sooner: `python -m sae_lora.common.lazy_imports MODULE …` runs one so.

Objects of torch, transformers and the like stay in memory. Python would search them for garbage again
and again during the import, for nothing: a third of the time that such an import takes.
"""

import gc
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_LARGE = "torch transformers peft sae_lens datasets pandas plotly wandb lm_eval".split()


class _Finder(MetaPathFinder):
    """Finder of modules of large libraries, which has them executed without a search."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _LARGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                was_enabled = gc.isenabled()
                gc.disable()
                try:
                    execute(module)
                finally:
                    if was_enabled:
                        gc.freeze()
                        gc.enable()

            spec.loader.exec_module = exec_module
        return spec


def import_quickly() -> None:
    """Let this process import large libraries without a search for garbage, from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def main() -> int:
    """Run the module of that name as a program, with the arguments that follow it."""
    import_quickly()
    del sys.argv[0]
    return importlib.import_module(sys.argv[0]).main()


if __name__ == "__main__":
    sys.exit(main())
