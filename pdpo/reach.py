"""Which code a function can reach, as a hash: the part of a stage's key that nobody maintains.

From a function's source every name that it uses is followed to its definition in this package, and on from there. What is
hashed is each definition reached: its name and its syntax tree. Comments, docstrings, layout, annotations, the texts of errors
and of print, and the file in which a definition stands leave the hash as it was; everything else that is reached changes it.

A method is reached where its name stands behind a dot anywhere in what is reached, whichever class has it: too much rather
than too little. A name put together at run time (getattr) is not seen.
"""

import ast
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# read once, when this process begins: the code that runs is that code, whatever happens to the files meanwhile
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}


def in_key(function: Callable) -> Callable:
    """Marks a function whose result stands in every key by itself: it and what lies behind it are not followed."""
    return function


class Definition(NamedTuple):
    """A function, method, class or constant: the module in which its names are looked up, its own name, its cleaned tree."""

    module: str
    name: str
    tree: ast.AST


class Package:
    """All definitions of some modules, by module and name, and the methods by their name alone."""

    def __init__(self, sources: dict[str, str], *, name: str = "pdpo"):
        self.name, self.imports, self.defined, self.methods = name, {}, {}, {}
        for module, source in sources.items():
            tree = _Clean().visit(ast.parse(source))
            self.imports[module] = dict(self._bindings(tree.body))
            for node in tree.body:
                for defined in _names(node):
                    self.defined[module, defined] = Definition(module, defined, node)
                if isinstance(node, ast.ClassDef):
                    self._take_methods(module, node)

    def _take_methods(self, module: str, node: ast.ClassDef) -> None:
        """Methods are definitions of their own; those with double underscores stay with their class."""
        functions = [each for each in node.body if isinstance(each, ast.FunctionDef) and not each.name.startswith("__")]
        for function in functions:
            self.methods.setdefault(function.name, []).append(Definition(module, f"{node.name}.{function.name}", function))
        node.body = [each for each in node.body if each not in functions]

    def _bindings(self, body: list[ast.stmt]):
        """(name, (module, name there or None for the module itself)) for what these statements import from the package."""
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.module == self.name:
                yield from ((alias.asname or alias.name, (alias.name, None)) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{self.name}."):
                module = node.module.split(".", 1)[1]
                yield from ((alias.asname or alias.name, (module, alias.name)) for alias in node.names)

    def definition(self, module: str, qualified_name: str) -> Definition:
        """Of a function by its __qualname__, also of one defined within another."""
        tree = ast.Module([each.tree for (where, _), each in self.defined.items() if where == module], [])
        for part in qualified_name.replace(".<locals>", "").split("."):
            tree = next(
                node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
            )
        return Definition(module, tree.name, tree)

    def reached(self, start: Definition) -> set[tuple[str, str]]:
        """(name, dump of the syntax tree) of every definition that `start` can reach, itself among them."""
        seen, waiting = {}, [start]
        while waiting:
            each = waiting.pop()
            if (each.module, each.name) in seen:
                continue
            marked = (node.id for node in getattr(each.tree, "decorator_list", ()) if isinstance(node, ast.Name))
            if "in_key" not in marked:
                seen[each.module, each.name] = (each.name, ast.dump(each.tree))
                waiting += self._used(each)
        return set(seen.values())

    def _used(self, definition: Definition):
        """The definitions whose names stand in one."""
        nodes = list(ast.walk(definition.tree))
        local = dict(self._bindings(nodes))
        for node in nodes:
            if isinstance(node, ast.Name):
                yield from self._found(definition.module, node.id, local)
            elif isinstance(node, ast.Attribute):
                yield from self.methods.get(node.attr, ())
                if isinstance(node.value, ast.Name):
                    bound = local.get(node.value.id) or self.imports[definition.module].get(node.value.id)
                    if bound and bound[1] is None and bound[0] in self.imports:
                        yield from self._found(bound[0], node.attr, {})

    def _found(self, module: str, name: str, local: dict):
        bound = local.get(name) or self.imports[module].get(name)
        if bound and bound[1] is not None and bound[0] in self.imports:
            yield from self._found(*bound, {})
        elif (module, name) in self.defined:
            yield self.defined[module, name]


class _Clean(ast.NodeTransformer):
    """Takes out what does not compute: docstrings, annotations, the texts of errors and of print."""

    def visit_Expr(self, node: ast.Expr):
        says = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name) and node.value.func.id == "print"
        return None if says or isinstance(node.value, ast.Constant) else self.generic_visit(node)

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


def _names(node: ast.stmt) -> list[str]:
    """What a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def code_version(function: Callable) -> str:
    """A hash of the code that a function of this package can reach."""
    return code_version_of(name_of(function))


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


def version(reached: set[tuple[str, str]]) -> str:
    """The hash of what `Package.reached` gives."""
    return hashlib.sha256(repr(sorted(reached)).encode()).hexdigest()[:16]
