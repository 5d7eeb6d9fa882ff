"""Small changes of a module's syntax tree: operators, comparisons, conditions, numbers, calls that do something."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import Any

COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
"""Functions in whose place others are called."""


def changes(tree: ast.Module) -> Iterator[tuple[Any, str]]:
    """(node, new text) of every change; annotations, decorators, texts and messages of errors stay."""
    yield from _within(tree)


def _within(node: ast.AST) -> Iterator[tuple[Any, str]]:
    for child in _children(node):
        yield from _of(child)
        yield from _within(child)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Parts of a node that are run."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    skipped = {
        "annotation",
        "returns",
        "decorator_list",
        "type_params",
        "bases",
        "keywords" if isinstance(node, ast.ClassDef) else "",
    }
    for name, value in ast.iter_fields(node):
        if name not in skipped:
            yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, ast.AST))


def _of(node: Any) -> Iterator[tuple[Any, str]]:
    """Changes of the node itself."""
    changed: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        changed.ops[0] = COMPARISONS[type(node.ops[0])]()
        yield node, f"({ast.unparse(changed)})"
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not _is_text(node):
        changed.op = OPERATORS[type(node.op)]()
        yield node, f"({ast.unparse(changed)})"
    elif isinstance(node, ast.BoolOp):
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node, f"({ast.unparse(changed)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.IfExp):
        changed.body, changed.orelse = node.orelse, node.body
        yield node, f"({ast.unparse(changed)})"
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield node, repr(not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield node, f"({node.value + 1 if type(node.value) is int else 2 * node.value + 1e-3 * (not node.value)!r})"
    elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        changed.op = OPERATORS[type(node.op)]()
        yield node, ast.unparse(changed)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, "pass"
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in NAMES:
        yield node, NAMES[node.id]
    elif isinstance(node, ast.If | ast.While) and _is_plain(node.test):
        yield node.test, f"(not {ast.unparse(node.test)})"


def _is_plain(test: ast.expr) -> bool:
    """Whether a condition has no change of its own."""
    return not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp) and ast.unparse(test) != "TYPE_CHECKING"


def _is_text(node: ast.BinOp) -> bool:
    """Whether an operand is a text: those are joined or formatted, and types are united in annotations."""
    return any(isinstance(part, ast.JoinedStr) or _is_no_number(part) for part in (node.left, node.right))


def _is_no_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and not isinstance(node.value, int | float)
