"""Which code a function can reach, as a hash: the part of a stage's key that nobody maintains.

From a function's source every name that it uses is followed to its definition in this package, and on from there. What is
hashed is the syntax tree of each definition reached. Comments, docstrings, layout, annotations, the texts of errors and of
print, progress bars, where an import stands and in which file a definition does leave the hash as it was; everything else
that is reached changes it.

A method is reached where its name stands behind a dot anywhere in what is reached, whichever class has it, or where its class
is: too much rather than too little. A name put together at run time (getattr) is not seen."""

import ast
import functools
import hashlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


def read_sources() -> dict[str, str]:
    """The text of every module of the package, as it lies on the disk."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}


# read once, when this process begins: the code that runs is that code, whatever happens to the files meanwhile
SOURCES = read_sources()


def in_key(function: Callable) -> Callable:
    """Marks a function whose result stands in every key by itself: it and what lies behind it are not followed."""
    return function


class Definition(NamedTuple):
    """A statement, without what does not compute, and the module in which its names are looked up."""

    module: str
    tree: ast.AST


class Package:
    """All definitions of some modules, by module and name, and what classes hold, by its name alone."""

    def __init__(self, sources: dict[str, str], *, name: str = "pdpo"):
        self.name, self.imports, self.defined, self.held = name, {}, {}, {}
        for module, source in sources.items():
            body = _statements(source)
            self.imports[module] = dict(self._bindings(body))
            for node in itertools.chain.from_iterable(map(self._apart, body)):
                for defined in _names(node):
                    self.defined.setdefault((module, defined), []).append(Definition(module, node))
                for inner in node.body if isinstance(node, ast.ClassDef) else ():
                    for defined in _names(inner) if isinstance(inner, ast.FunctionDef | ast.Assign) else ():
                        self.held.setdefault(defined, []).append(Definition(module, inner))

    def _bindings(self, body: list[ast.AST]):
        """(name, (module, name there or None for the module itself)) for what these statements import from the package."""
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.module == self.name:
                yield from ((alias.asname or alias.name, (alias.name, None)) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{self.name}."):
                module = node.module.split(".", 1)[1]
                yield from ((alias.asname or alias.name, (module, alias.name)) for alias in node.names)

    def _apart(self, node: ast.stmt) -> list[ast.stmt]:
        """An import as one statement a name; of those from the package only what is given another name."""
        if not isinstance(node, ast.Import | ast.ImportFrom):
            return [node]
        module = getattr(node, "module", None)
        inside = module is not None and module.split(".")[0] == self.name
        module = "" if inside else module  # where in the package it stands does not matter
        return [ast.ImportFrom(module, [alias], 0) for alias in node.names if alias.asname or not inside]

    def definition(self, module: str, qualified_name: str) -> Definition:
        """Of a function by its __qualname__, also of one defined within another."""
        tree = ast.Module([each.tree for (where, _), found in self.defined.items() if where == module for each in found], [])
        for part in qualified_name.replace(".<locals>", "").split("."):
            inner = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef))
            tree = next(node for node in inner if node.name == part)
        return Definition(module, tree)

    def reached(self, start: Definition) -> set[str]:
        """The dump of the syntax tree of every definition that `start` can reach, itself among them."""
        seen, waiting = {}, [start]
        while waiting:
            each = waiting.pop()
            marks = (node.id for node in getattr(each.tree, "decorator_list", ()) if isinstance(node, ast.Name))
            if each not in seen and "in_key" not in marks:
                nodes = list(ast.walk(each.tree))
                seen[each] = self._dump(each.tree)
                waiting += self._used(each.module, nodes)
        return set(seen.values())

    def _dump(self, tree: ast.AST) -> str:
        """The tree as text, without the imports within it: `_used` gives them, as it does those of the module."""
        text = ast.dump(tree)
        return text if isinstance(tree, ast.ImportFrom) else re.sub(r"Import(From)?\([^\]]*\](, level=0)?\)(, )?", "", text)

    def _used(self, module: str, nodes: list[ast.AST]):
        """The definitions whose names stand in these nodes, and the imports within them."""
        local = dict(self._bindings(nodes))
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom) and node is not nodes[0]:
                yield from (Definition(module, each) for each in self._apart(node))
            elif isinstance(node, ast.Name):
                yield from self._found(module, node.id, local)
            elif isinstance(node, ast.Attribute):
                yield from self.held.get(node.attr, ())
                if isinstance(node.value, ast.Name):
                    bound = local.get(node.value.id) or self.imports[module].get(node.value.id)
                    if bound and bound[1] is None and bound[0] in self.imports:
                        yield from self._found(bound[0], node.attr, {})

    def _found(self, module: str, name: str, local: dict):
        yield from self.defined.get((module, name), ())
        bound = local.get(name) or self.imports[module].get(name)
        if bound and bound[1] is not None and bound[0] in self.imports:
            yield from self._found(*bound, {})


class _Clean(ast.NodeTransformer):
    """Takes out what does not compute: docstrings, annotations, the texts of errors and of print, and progress bars."""

    def visit_Expr(self, node: ast.Expr):
        says = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name) and node.value.func.id == "print"
        return None if says or isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call):
        shown = isinstance(node.func, ast.Name) and node.func.id == "progress" and node.args
        return self.visit(node.args[0]) if shown else self.generic_visit(node)

    def visit_If(self, node: ast.If):
        if isinstance(node.body[-1], ast.Raise) and all(isinstance(each, ast.Assign) for each in node.body[:-1]):
            node.body = node.body[-1:]  # the assignments hold parts of the error's text
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(raised, None)

    def visit_arg(self, node: ast.arg):
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef):
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign):
        node.annotation = ast.Constant(None)  # the statement stays: it makes a dataclass's field
        return self.generic_visit(node)


@functools.cache
def _statements(source: str) -> list[ast.stmt]:
    """Of a module, without what does not compute."""
    return _Clean().visit(ast.parse(source)).body


def _names(node: ast.stmt) -> set[str]:
    """The names that a statement defines or alters: of a statement that is no definition, all that stand in it."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    parts = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else [node]
    within = [each for part in parts for each in ast.walk(part)]
    named = {each.name for each in within if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    imported = {(each.asname or each.name).split(".")[0] for each in within if isinstance(each, ast.alias)}
    return named | imported | {each.id for each in within if isinstance(each, ast.Name)}


@in_key
def code_version(function: Callable) -> str:
    """A hash of the code that a function of this package can reach; ValueError for one from elsewhere."""
    found = code_version_of(name_of(function))
    if not found:
        raise ValueError(f"code_version: expected a function of pdpo's modules, got {name_of(function)}. Define it there.")
    return found


def name_of(function: Callable) -> str:
    """By which `code_version_of` finds it: module and qualified name."""
    return f"{function.__module__.removeprefix('pdpo.')}:{function.__qualname__}"


@functools.cache
def code_version_of(name: str) -> str:
    """`code_version` of the function with that `name_of`; "" where there is none today."""
    package, (module, _, qualified_name) = _package(), name.partition(":")
    try:
        return version(package.reached(package.definition(module, qualified_name)))
    except (KeyError, StopIteration):
        return ""


@functools.cache
def _package() -> Package:
    return Package(SOURCES)


def version(reached: set[str]) -> str:
    """The hash of what `Package.reached` gives."""
    return hashlib.sha256(repr(sorted(reached)).encode()).hexdigest()[:16]
