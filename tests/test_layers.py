"""Who may import whom: the packages of mkaq lie in levels, and a module reads only what is below it."""

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import mkaq

ROOT = Path(mkaq.__file__).parent
BASE = {"mkaq", "errors", "units", "paths", "files", "digests", "dtypes", "console"}
BASE |= {"heap", "peak", "progress", "ranks"}
WORK = ("merge", "quantize", "recover", "calibrate", "evaluate")
TOP = {"recipe", "recipe_keys", "recipe_file", "recipe_yaml", "pipeline", "manifest", "budget"}
TOP |= {"plan", "result", "report", "drawings", "card", "session", "verification", "shipped"}
LEVELS: tuple[tuple[str, ...], ...] = (
    ("base",),
    ("arch",),
    ("formats",),
    ("checkpoint",),
    ("walk",),
    ("fit",),
    WORK,
    ("distill",),
    ("verify", "export", "generate"),
    ("run", "bench"),
    ("stages",),
    ("top",),
    ("cli",),
)
"""From low to high; packages of one level do not import each other."""
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
PURE = {f"fit.{name}" for name in ("gram", "moments", "ridge", "select", "shuffle")}
PURE |= {f"merge.{name}" for name in ("manifold", "npib", "average", "segment")}
PURE |= {f"quantize.{name}" for name in ("gptq", "gptq_cpu", "gptq_cuda")} | {"formats.packing"}
LONGEST, MEDIAN = 350, 120


class Import(NamedTuple):
    """An import statement that runs."""

    module: str
    line: int
    inside: bool
    """Whether it is inside a function."""


def name_of(path: Path) -> str:
    """A file's module below mkaq; `mkaq` for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "mkaq"


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    """The package of a module; those at the top of mkaq are `base`, `top` or `cli`."""
    package, _, below = module.partition(".")
    if below or (ROOT / package).is_dir():
        return package
    if package in BASE:
        return "base"
    assert package in TOP | {"__main__"}, f"mkaq/{package}.py has no level"
    return "cli" if package == "__main__" else "top"


def imports_of(text: str) -> list[Import]:
    """Every import of mkaq's own modules but those that only a type checker reads."""
    return list(_visit(ast.parse(text).body, inside=False))


def _visit(nodes: list[ast.stmt], inside: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (_own(alias.name, node, inside) for alias in node.names if _is_own(alias.name))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if _is_own(node.module or ""):
                yield from (_own(f"{node.module}.{alias.name}", node, inside) for alias in node.names)
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for field, value in ast.iter_fields(node):
            if for_types and field == "body":
                continue
            for part in value if isinstance(value, list) else ():
                if isinstance(part, ast.stmt):
                    yield from _visit([part], inside or function)
                elif isinstance(part, (ast.ExceptHandler, ast.match_case)):
                    yield from _visit(part.body, inside or function)


def _is_own(name: str) -> bool:
    return name.split(".")[0] == "mkaq"


def _own(name: str, node: ast.stmt, inside: bool) -> Import:
    """The module that a dotted name leads to: itself, or the one that defines it."""
    below = name.removeprefix("mkaq").removeprefix(".")
    module = below if below in FILES else below.rpartition(".")[0]
    assert module == "" or module in FILES, f"line {node.lineno} imports {name}"
    return Import(module or "mkaq", node.lineno, inside)


def may_import(module: str, found: Import) -> bool:
    """Its own package and lower levels; `pipeline`, which names the stages, its own level in functions."""
    own, other = room_of(module), room_of(found.module)
    if module == "pipeline" and own == other:
        return found.inside
    return own == other or LEVEL_OF[other] < LEVEL_OF[own]


def test_a_module_imports_its_own_package_and_lower_levels() -> None:
    breaks = [
        f"mkaq/{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for module, path in FILES.items()
        for found in imports_of(path.read_text())
        if not may_import(module, found)
    ]
    assert breaks == []


def test_pure_mathematics_import_only_each_other_and_errors() -> None:
    assert FILES.keys() >= PURE
    breaks = [
        f"{module}: {found.module}, line {found.line}"
        for module in PURE
        for found in imports_of(FILES[module].read_text())
        if found.module not in PURE | {"errors"}
    ]
    assert breaks == []


def test_only_arch_knows_where_layers_are_in_a_model() -> None:
    others = {module: path for module, path in FILES.items() if room_of(module) != "arch"}
    assert [module for module, path in others.items() if "model.layers" in path.read_text()] == []


def test_files_are_short() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert {module for module, count in lines.items() if count > LONGEST} == set()
    assert median(lines.values()) <= MEDIAN


def test_every_package_has_a_level() -> None:
    rooms = {path.parent.name for path in FILES.values() if path.parent != ROOT}
    assert rooms == LEVEL_OF.keys() - {"base", "top"}


def test_imports_are_found_wherever_they_run() -> None:
    text = """
from typing import TYPE_CHECKING
import mkaq.errors
from mkaq import pipeline, __version__
if TYPE_CHECKING:
    from mkaq.recipe import Recipe
else:
    from mkaq.units import human

class Thing:
    def method(self):
        try:
            from mkaq.stages import merge
        except ImportError:
            from mkaq.stages.merge import NAME
"""
    found = {(one.module, one.inside) for one in imports_of(text)}
    outside = {(name, False) for name in ("errors", "pipeline", "mkaq", "units")}
    assert found == outside | {("stages.merge", True)}
