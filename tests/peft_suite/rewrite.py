"""Upstream test modules, rewritten for another config class: case lists replaced, tests that use none of them dropped.

Edits keep every line where it was, so a traceback names the line of the upstream file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.peft_suite.adjustments import ADOPTED
from tests.peft_suite.specs import CASE_LISTS, Spec


HEADER = "from tests.peft_suite.specs import active as _active; _spec = _active(); "
HUB_ID = re.compile(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+")


class UpstreamChanged(RuntimeError):
    """PEFT's test module no longer has something that the harness replaces."""


@dataclass(frozen=True)
class Rewritten:
    """A module ready to run, what was kept and dropped of it, and the Hub ids that the kept part names."""

    source: str
    kept: list[str]
    dropped: list[str]
    hub_ids: set[str]


class Edits:
    """Replacements of text ranges, applied together; a range's line breaks survive it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line.encode()))
        self.raw = source.encode()
        self.edits: list[tuple[int, int, bytes]] = []

    def replace(self, first: ast.AST, last: ast.AST, text: str) -> None:
        """Put `text` where the nodes `first` to `last` are."""
        begin = self.starts[first.lineno - 1] + first.col_offset
        end = self.starts[last.end_lineno - 1] + last.end_col_offset
        breaks = self.raw[begin:end].count(b"\n") - text.count("\n")
        self.edits.append((begin, end, text.encode() + b"\n" * breaks))

    def insert(self, before: ast.AST, text: str) -> None:
        """Put `text` on the line of a node, in front of it."""
        begin = self.starts[before.lineno - 1] + before.col_offset
        self.edits.append((begin, begin, text.encode()))

    def apply(self) -> str:
        """The edited source; an edit inside a range that another edit replaces is dropped."""
        result, done = self.raw, len(self.raw) + 1
        outer: list[tuple[int, int, bytes]] = []
        for edit in sorted(self.edits, key=lambda edit: (edit[0], -edit[1])):
            if not outer or edit[0] >= outer[-1][1]:
                outer.append(edit)
        for begin, end, text in reversed(outer):
            if end > done:
                raise AssertionError("edits overlap")
            result, done = result[:begin] + text + result[end:], begin
        return result.decode()


def rewrite(module: str, source: str, spec: Spec) -> Rewritten:
    """Rewrite the upstream test module `module`; raises UpstreamChanged when a list or a patched line is not there."""
    source = patched(module, source, spec)
    tree = ast.parse(source)
    edits = Edits(source)
    replaced = _replace_lists(module, tree, edits)
    kept: list[str] = []
    dropped: list[str] = []
    hub_ids: set[str] = set()
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or not any(_tests(node)):
            hub_ids |= _hub_ids([node])
            continue
        used = [test for test in _tests(node) if _is_kept(module, test, replaced, spec, edits)]
        unused = [test for test in _tests(node) if test not in used]
        for unwanted in unused if used else [node]:
            _delete(unwanted, edits)
        if used and all(test.name in ADOPTED.get(module, ()) for test in used):
            _adopt_helpers(node, spec, edits)
        hub_ids |= _hub_ids([part for part in node.body if part not in unused]) if used else set()
        kept += [f"{node.name}.{test.name}" for test in used]
        dropped += [f"{node.name}.{test.name}" for test in unused]
    missing = set(ADOPTED.get(module, ())) - {name.split(".")[1] for name in kept} - _dropped_names(module, spec)
    if missing:
        raise UpstreamChanged(f"{module}.py: no test {', '.join(sorted(missing))}")
    edits.insert(_first_import(tree), HEADER)
    return Rewritten(edits.apply(), kept, dropped, hub_ids)


def _dropped_names(module: str, spec: Spec) -> set[str]:
    return {test.removeprefix(f"{module}::") for test in spec.drop if test.startswith(f"{module}::")}


def patched(module: str, source: str, spec: Spec) -> str:
    """Apply the source patches of the harness and of the spec; each must match, and keep the number of lines."""
    for patch in spec.patches_for(module):
        if patch.old not in source or patch.old.count("\n") != patch.new.count("\n"):
            raise UpstreamChanged(f"{module}.py: the patch {patch.reason!r} does not apply")
        source = source.replace(patch.old, patch.new)
    return source


def _replace_lists(module: str, tree: ast.Module, edits: Edits) -> set[str]:
    """Replace the module's case lists; returns their names and the names of what is derived from them."""
    wanted = set(CASE_LISTS[module])
    found: set[str] = set()
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        if name in wanted:
            edits.replace(node.value, node.value, f'_spec.cases("{module}", "{name}")')
            found.add(name)
        elif _names(node.value) & found:
            found.add(name)
    if not wanted <= found:
        raise UpstreamChanged(f"{module}.py: no list {', '.join(sorted(wanted - found))}")
    return found


def _rewrite_test(test: ast.FunctionDef, replaced: set[str], edits: Edits) -> bool:
    """Replace the configs a test is given; False when it is given none and is to be dropped."""
    depends = False
    for decorator in test.decorator_list:
        if not _is_parametrize(decorator):
            continue
        names, values = decorator.args
        if isinstance(values, ast.Name):
            depends |= values.id in replaced
        elif _is_uniform(values, ast.Name) and _uses(test, names):
            edits.replace(values, values, "[_spec.bare_cls]")
            depends = True
        elif _is_uniform(values, ast.Call) and len({ast.unparse(value.func) for value in values.elts}) > 1:
            lora = next(value for value in values.elts if ast.unparse(value.func) == "LoraConfig")
            edits.replace(values, values, f"_spec.configs({ast.unparse(lora)})")
            for keyword in decorator.keywords:
                edits.replace(keyword.value, keyword.value, "None")
            depends = True
    return depends


def _adopt(node: ast.AST, spec: Spec, edits: Edits) -> bool:
    """Put the spec's config and prefix in place of LoRA's in a body; a class passed on, not called, stays a class."""
    called = {id(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id == "LoraConfig":
            edits.replace(part, part, "_spec.fresh" if id(part) in called else "_spec.bare_cls")
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and ".lora_" in part.value:
            edits.replace(part, part, repr(part.value.replace(".lora_", f".{spec.prefix}")))
    return True


def _adopt_helpers(node: ast.ClassDef, spec: Spec, edits: Edits) -> None:
    """The methods that the adopted tests of a class call."""
    tests = list(_tests(node))
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part not in tests:
            _adopt(part, spec, edits)


def _is_kept(module: str, test: ast.FunctionDef, replaced: set[str], spec: Spec, edits: Edits) -> bool:
    if test.name in _dropped_names(module, spec):
        return False
    if test.name in ADOPTED.get(module, ()):
        return _adopt(test, spec, edits)
    return _rewrite_test(test, replaced, edits)


def _tests(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    return (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name.startswith("test_"))


def _is_parametrize(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize"


def _is_uniform(values: ast.expr, kind: type[ast.expr]) -> bool:
    """A list in the decorator that has only config classes (Name) or only configs (Call), LoRA's among them."""
    if not isinstance(values, ast.List) or not all(isinstance(value, kind) for value in values.elts):
        return False
    classes = [ast.unparse(value.func if isinstance(value, ast.Call) else value) for value in values.elts]
    return "LoraConfig" in classes and all(name.endswith("Config") for name in classes)


def _uses(test: ast.FunctionDef, names: ast.expr) -> bool:
    """Whether the test's body reads the parameter: one upstream test is given a class and ignores it."""
    return bool(set().union(*map(_names, test.body)) & {name.strip() for name in ast.literal_eval(names).split(",")})


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}


def _hub_ids(nodes: list[ast.AST]) -> set[str]:
    strings = (part.value for node in nodes for part in ast.walk(node) if isinstance(part, ast.Constant))
    return {value for value in strings if isinstance(value, str) and HUB_ID.fullmatch(value)}


def _delete(node: ast.FunctionDef | ast.ClassDef, edits: Edits) -> None:
    first = min([node, *node.decorator_list], key=lambda part: part.lineno)
    marker = ast.copy_location(ast.Pass(), first)
    if first is not node:
        marker.col_offset -= 1  # the decorator's @
    edits.replace(marker, node, "pass")


def _first_import(tree: ast.Module) -> ast.stmt:
    imports = (node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    return next(node for node in imports if getattr(node, "module", None) != "__future__")
