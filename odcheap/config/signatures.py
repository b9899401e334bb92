"""Types and ranges of options, read from source files: PyTorch, which takes seconds, is not imported for them."""

import ast
import builtins
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field

PACKAGE = Path(__file__).parents[1]
NAMES = {name: getattr(builtins, name) for name in ("bool", "float", "int", "list", "str", "tuple")}
NAMES |= {"Annotated": Annotated, "Any": Any, "Field": Field, "Literal": Literal}


class SourceNames(dict[str, Any]):
    """Names that annotations in a module may use: constants of this module, or of those from which it imports them.

    Args:
        module: The dotted path of one of odcheap's modules.
    """

    def __init__(self, module: str):
        super().__init__(NAMES)
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        is_known = module.startswith("odcheap.") and path.is_file()
        self.tree = ast.parse(path.read_text(encoding="utf-8") if is_known else "")

    def __missing__(self, name: str) -> Any:
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return self.evaluate(node.value)
            if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
                return SourceNames(node.module or "")[name]
        raise KeyError(name)

    def evaluate(self, expression: ast.expr) -> Any:
        """Returns the value of an expression; raises `NameError` or `KeyError` if it has a name that is not known."""
        return eval(ast.unparse(expression), {"__builtins__": {}}, self)


def read_source_annotations(target: str) -> dict[str, Any]:
    """Returns the annotations of the arguments of one of odcheap's classes or functions, as far as they are known.

    An annotation with another name, such as that of a class of PyTorch, is left out.

    Args:
        target: The dotted path of the class or function, such as `odcheap.methods.od.OnlineDistillation`.
    """
    module, _, name = target.rpartition(".")
    names = SourceNames(module)
    body = [node for node in names.tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
    inner = [node for part in body if isinstance(part, ast.ClassDef) for node in part.body]
    functions = [node for node in (*inner, *body) if isinstance(node, ast.FunctionDef)]
    constructor = next((node for node in functions if node.name in ("__init__", name)), None)
    if constructor is not None:
        found = {a.arg: a.annotation for a in [*constructor.args.args, *constructor.args.kwonlyargs]}
    else:  # a data class
        fields = [node for node in inner if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
        found = {cast(ast.Name, node.target).id: node.annotation for node in fields}
    known: dict[str, Any] = {}
    for argument, annotation in found.items():
        if annotation is not None:
            with suppress(NameError, KeyError, AttributeError, TypeError):
                known[argument] = names.evaluate(annotation)
    return known
