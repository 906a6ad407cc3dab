"""Loops over a few vector elements, written once and unrolled in the syntax tree before Numba sees them.

A local array stays in registers only if every index into it is a constant. The compiler for sm_100 and later leaves
short loops rolled, and the array then lives in memory: unrolling the source avoids that.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import linecache
import operator
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

static_range = range
"""A range that :func:`unrolled` expands; its bounds are literals or closure variables."""

_FOLDED: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.RShift: operator.rshift,
}
_number = itertools.count()


def unrolled(function: Callable[..., Any], **counts: int) -> Callable[..., Any]:
    """Return ``function`` with its static loops expanded and its static choices made.

    Closure variables that are whole numbers or booleans become literals. A ``for`` over ``static_range`` becomes its
    bodies, and an ``if`` whose test is a literal becomes its branch. Other closure variables become globals. With
    ``numbers=3`` the parameter ``numbers`` becomes three, numbers_0 to numbers_2, which ``*numbers`` in a call passes on.
    """
    values = inspect.getclosurevars(function).nonlocals
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    definition.args.args = [
        ast.arg(name, argument.annotation)
        for argument in definition.args.args
        for name in _numbered(argument.arg, counts)
    ]
    literals = {name: value for name, value in values.items() if type(value) in (int, bool)}
    tree = ast.fix_missing_locations(_Unroller(literals, counts).visit(tree))
    source = ast.unparse(tree)
    file = f"<unrolled {function.__name__} {next(_number)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    namespace = {**function.__globals__, **values}
    exec(compile(source, file, "exec"), namespace)
    result: Callable[..., Any] = namespace[function.__name__]
    return result


def numbered(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return arguments for a parameter that became several: ``{"numbers_0": 0.9, "numbers_1": 0.999}``."""
    return dict(zip(_numbered(name, {name: len(values)}), values, strict=True))


class _Unroller(ast.NodeTransformer):
    def __init__(self, literals: Mapping[str, int], counts: Mapping[str, int]) -> None:
        self.literals, self.counts = literals, counts

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node = self._inner(node)
        arguments: list[ast.expr] = []
        for argument in node.args:
            passed = argument.value if isinstance(argument, ast.Starred) else None
            if isinstance(passed, ast.Name) and passed.id in self.counts:
                arguments += [ast.Name(number, ast.Load()) for number in _numbered(passed.id, self.counts)]
            else:
                arguments.append(argument)
        node.args = arguments
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.literals:
            return ast.copy_location(ast.Constant(self.literals[node.id]), node)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        node = self._inner(node)
        fold = _FOLDED.get(type(node.op))
        if fold and _is_int(node.left) and _is_int(node.right):
            return ast.copy_location(ast.Constant(fold(node.left.value, node.right.value)), node)  # type: ignore[attr-defined]
        return node

    def visit_If(self, node: ast.If) -> Any:
        node = self._inner(node)
        if not isinstance(node.test, ast.Constant):
            return node
        return (node.body if node.test.value else node.orelse) or ast.Pass()

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        node = self._inner(node)
        if not isinstance(node.test, ast.Constant):
            return node
        return node.body if node.test.value else node.orelse

    def visit_For(self, node: ast.For) -> Any:
        loop = node.iter
        if not (isinstance(loop, ast.Call) and getattr(loop.func, "id", None) == "static_range"):
            return self._inner(node)
        assert isinstance(node.target, ast.Name)
        bounds = [ast.literal_eval(self.visit(argument)) for argument in loop.args]
        statements: list[ast.stmt] = []
        for value in range(*bounds):
            unroller = _Unroller({**self.literals, node.target.id: value}, self.counts)
            for statement in copy.deepcopy(node.body):
                result = unroller.visit(statement)
                statements += result if isinstance(result, list) else [result]
        return statements or ast.Pass()

    def _inner(self, node: Any) -> Any:
        return self.generic_visit(node)


def _numbered(name: str, counts: Mapping[str, int]) -> list[str]:
    return [f"{name}_{k}" for k in range(counts[name])] if name in counts else [name]


def _is_int(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int
