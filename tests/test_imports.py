"""Imports go one way, and what answers at once imports no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import megatron_btx
from megatron_btx.cli.main import _COMMANDS

PACKAGE = Path(megatron_btx.__file__).parent
ORDER = (
    "errors files cpu_info provenance svg recipe weights families mix engine data evaluate train "
    "pipeline report cli"
)
ROOMS = ORDER.split()
"""Each may import itself and those before it."""

TORCH_FREE = (
    "cli.main",
    *(f"cli.{module}" for module in _COMMANDS),
    "evaluate.model_spec",
    "evaluate.results",
    "mix.request",
    "pipeline.eval_ranks",
    "pipeline.graph",
    "pipeline.import_checkpoint",
    "pipeline.local.run_stages",
    "pipeline.run_checks",
    "pipeline.slurm.attempt",
    "pipeline.slurm.commands",
    "pipeline.slurm.preflight",
    "pipeline.slurm.script",
    "pipeline.slurm.status",
    "pipeline.slurm.submit",
    "pipeline.state",
    "pipeline.worker",
    "recipe.check",
    "cpu_info",
    "recipe.load",
    "report.page",
    "report.routing",
    "report.table",
    "provenance",
    "weights.manifest",
)


def _room(module: str) -> str:
    """``megatron_btx.recipe.load`` -> ``recipe``; the package itself is nobody's room."""
    return module.split(".")[1] if "." in module else ""


def _imports(path: Path) -> list[tuple[int, str]]:
    """Line and name of every import of the package's own modules, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if module == "megatron_btx" else module) for name in names]
    return [(line, name) for line, name in found if name.split(".")[0] == "megatron_btx"]


def test_imports_go_one_way() -> None:
    wrong = []
    modules = {".".join(("megatron_btx", *p.relative_to(PACKAGE).with_suffix("").parts))
               for p in PACKAGE.rglob("*.py")}  # fmt: skip
    modules |= {module.removesuffix(".__init__") for module in modules}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        assert room in ROOMS, f"{path}: no room of the order above"
        for line, name in _imports(path):
            other = _room(name)
            if other in ROOMS and ROOMS.index(other) > ROOMS.index(room):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
            if other in ROOMS and name not in modules:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: there is no {name}")
    assert not wrong, "\n".join(wrong)


def _graph() -> dict[str, set[str]]:
    """Every file's module name, and the package's modules that it imports anywhere, under
    ``TYPE_CHECKING`` and inside functions too."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("megatron_btx", *path.relative_to(PACKAGE).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    graph[module] |= {inner if inner in files else str(node.module)} & files.keys()
            elif isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names} & files.keys()
    return graph


def test_no_circle_of_imports() -> None:
    graph = _graph()
    while free := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in free}
    # What is left imports, at some distance, itself.
    rest = {module: sorted(needs & graph.keys()) for module, needs in graph.items()}
    assert not rest, rest


def test_parsers_of_the_command_line_are_in_cli() -> None:
    elsewhere = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "cli"
        and any(
            isinstance(node, ast.Import) and "argparse" in [alias.name for alias in node.names]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]
    assert not elsewhere


def test_what_answers_at_once_imports_neither_torch_nor_rich() -> None:
    code = (
        "import importlib, sys\n"
        f"for module in {TORCH_FREE}:\n"
        "    importlib.import_module(f'megatron_btx.{module}')\n"
        "    heavy = {'torch', 'numpy', 'rich', 'wandb', 'megatron'} & set(sys.modules)\n"
        "    assert not heavy, (module, heavy)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_rooms_that_lean_on_megatron_run_on_both_of_its_releases() -> None:
    """Those whose tests import it, or call ranks of the pool, are in the Makefile's list."""
    tests = Path(__file__).parent
    makefile = (tests.parent / "Makefile").read_text()
    _, _, listed = makefile.replace("\\\n", " ").partition("UPSTREAM := ")
    rooms = {path.split("/")[1] for path in listed.splitlines()[0].split()}
    leans = re.compile(r"^\s*(from|import) megatron[. ]|^from tests.ranks import", re.MULTILINE)
    leaning = {
        path.relative_to(tests).parts[0]
        for path in tests.glob("*/**/*.py")
        if leans.search(path.read_text(encoding="utf-8"))
    }
    # Megatron-Bridge is there for real.py only, which is run by hand; `make test-slurm` is Slurm's.
    assert leaning - rooms <= {"megatron_bridge", "slurm"}
