"""Finds the parameters of classes and functions, by importing them or by reading their source files.

Reading is faster, since an import of PyTorch takes seconds.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from odcheap.utils.errors import OptionError, first_line
from odcheap.utils.parts import OWN_PACKAGE, import_target

# Decorators that do not change a signature. What has others is not read from the source.
TRANSPARENT_DECORATORS = {"check_arguments", "dataclass", "_defaults_from_env_vars"}


class Signature(NamedTuple):
    """The parameters of a class (of its constructor) or of a function.

    If a constructor passes `**options` on to the constructor of its base class, the parameters of the base class are
    included.

    Attributes:
        annotations: The annotation of each parameter, by its name. Annotations that could not be read are left out.
        names: The names of all parameters.
        keyword_only: The names of the parameters that must be given by name.
        takes_any: True if arguments with any other name are accepted, too (`**kwargs`).
    """

    annotations: dict[str, Any]
    names: set[str]
    keyword_only: set[str]
    takes_any: bool


NO_PARAMETERS = Signature({}, set(), set(), takes_any=False)


class Unknown:
    """Takes the place of a class or function whose source cannot be read. It accepts every argument."""

    def __init__(self, **options: Any): ...


def import_signature(path: str, target: str) -> Signature:
    """Imports a class or function, and returns its parameters.

    Args:
        path: The dotted name in the config of the part that uses it, such as "method", for messages.
        target: The Python path of the class or function.

    Raises:
        OptionError: The class or function cannot be imported.
    """
    try:
        return inspect_signature(import_target(target))
    except (ImportError, AttributeError) as error:
        allowed = f"cannot be imported ({first_line(error)}){OWN_PACKAGE}"
        raise OptionError(f"{path}._target_", target, allowed) from error


def read_signature(_: str, target: str) -> Signature:
    """Returns the parameters of a class or function, read from its source file without an import.

    Annotations that cannot be evaluated without an import are left out. If the class or function is not found, the
    result is a signature that accepts every argument.

    Args:
        _: Not used. It is there so that the function can be called like `import_signature`.
        target: The Python path of the class or function, such as `odcheap.methods.od.OnlineDistillation`.
    """
    return inspect_signature(read_definition(target))


def inspect_signature(target: Callable[..., Any]) -> Signature:
    """Returns the parameters of a function, or of a class's constructor."""
    # For a class: its constructor, then those of its base classes as long as each passes `**options` on. Annotations
    # whose names are imported for type checkers only cannot be evaluated, and are left out.
    is_class = inspect.isclass(target)
    constructors = [cls.__init__ for cls in target.__mro__ if "__init__" in vars(cls)] if is_class else []
    found: list[Signature] = []
    for function in map(inspect.unwrap, constructors or [target]):
        parameters = list(inspect.signature(function).parameters.values())[is_class:]  # without `self`
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        hints: dict[str, Any] = {}
        for parameter in named:
            hint = parameter.annotation
            if hint is not parameter.empty:
                with suppress(NameError, AttributeError, TypeError):
                    hints[parameter.name] = eval(hint, function.__globals__) if isinstance(hint, str) else hint
        keyword_only = {p.name for p in named if p.kind is p.KEYWORD_ONLY}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        found.append(Signature(hints, {p.name for p in named}, keyword_only, takes_any))
        if not takes_any:
            break
    annotations = {name: hint for signature in reversed(found) for name, hint in signature.annotations.items()}
    return found[0]._replace(annotations=annotations, names=set().union(*(signature.names for signature in found)))


def read_definition(target: str) -> Callable[..., Any]:
    """Makes a stand-in for a class or function from its source, with the same parameters and docstring, but without a
    body.

    Args:
        target: The Python path of the class or function, which is not imported.

    Returns:
        The stand-in; the class `Unknown` if no class or function is found there.
    """
    module, _, name = target.rpartition(".")
    try:
        found = look_up(module, name)
    except KeyError:
        return Unknown
    return found if inspect.isclass(found) or inspect.isfunction(found) else Unknown


class SourceModule(dict[str, Any]):
    """The names that a module defines, as a dict, read from its source file without importing it.

    A constant has its value. A class or function is replaced by one with the same parameters and docstring, but without
    a body. A name that the module imports is looked up in the other module.

    Args:
        name: The dotted name of the module.
        path: Its source file.
    """

    def __init__(self, name: str, path: Path):
        super().__init__()
        self.pending: set[str] = set()  # the names that have been looked up
        self.package = name if path.stem == "__init__" else name.rpartition(".")[0]
        self.tree = ast.parse(path.read_text(encoding="utf-8"))

    def __missing__(self, name: str) -> Any:
        if name in self.pending:  # modules that import from each other
            raise KeyError(name)
        self.pending.add(name)
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                self[name] = self.evaluate(node.value)
            elif isinstance(node, ast.ClassDef) and node.name == name:
                self[name] = self.define_class(node)
            elif isinstance(node, ast.FunctionDef) and node.name == name:
                self[name] = self.define_function(node) if is_transparent(node) else Unknown
            elif isinstance(node, ast.ImportFrom):
                original = next((alias.name for alias in node.names if name == (alias.asname or alias.name)), None)
                if original is not None:
                    self[name] = look_up(self.name_origin(node), original)
            if name in self:
                return self[name]
        raise KeyError(name)

    def name_origin(self, node: ast.ImportFrom) -> str:
        """Returns the dotted name of the module in a statement `from MODULE import ...`, which may be relative."""
        return importlib.util.resolve_name("." * node.level + (node.module or ""), self.package)

    def evaluate(self, expression: ast.expr) -> Any:
        """Evaluates an expression of the module; raises `KeyError` if it contains a name that is not known."""
        try:
            return eval(ast.unparse(expression), self)
        except (NameError, AttributeError, TypeError) as error:
            raise KeyError(str(error)) from error

    def define_function(self, node: ast.FunctionDef) -> Callable[..., Any]:
        """Makes a function without a body that has the parameters (with unevaluated annotations) and docstring of a
        definition.
        """
        node.args.defaults = [ast.Constant(None) for _ in node.args.defaults]
        node.args.kw_defaults = [default and ast.Constant(None) for default in node.args.kw_defaults]
        source = f"from __future__ import annotations\ndef {node.name}({ast.unparse(node.args)}): ..."
        defined: dict[str, Any] = {}
        exec(source, self, defined)
        defined[node.name].__doc__ = ast.get_docstring(node)
        return defined[node.name]

    def define_class(self, node: ast.ClassDef) -> type:
        """Makes a class with the constructor and bases of a definition; bases that are not known become `Unknown`."""
        bases: list[type] = []
        for base in node.bases:
            try:
                bases.append(self.evaluate(base))
            except KeyError:
                bases.append(Unknown)
        body = node.body
        if "dataclass" in list_decorators(node):  # the fields of base classes are left out
            fields = [ast.unparse(item).partition(" = ")[0] for item in body if isinstance(item, ast.AnnAssign)]
            body = ast.parse(f"def __init__(self, {', '.join(fields)}): ...").body
        inits = [item for item in body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        members: dict[str, Any] = {"__doc__": ast.get_docstring(node)}
        if not all(map(is_transparent, [node, *inits])):
            bases = [Unknown]
        elif inits:
            members["__init__"] = self.define_function(inits[0])
        try:
            return type(node.name, tuple(bases), members)
        except TypeError:  # classes of the standard library that are made in other ways, and unknown ones
            return type(node.name, (Unknown,), members)


def list_decorators(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    """Returns the names of the decorators of a class or function, without their arguments."""
    return {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}


def is_transparent(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """Returns whether all decorators of a class or function are known to leave its parameters unchanged."""
    return list_decorators(node) <= TRANSPARENT_DECORATORS


@functools.cache
def read_module(name: str) -> SourceModule | None:
    """Reads the source file of a module, which is not imported; returns None if there is no such file."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for part in rest:  # the same function would import the packages that contain a module
            folders = spec.submodule_search_locations if spec else None
            spec = PathFinder.find_spec(part, folders) if folders else None
        path = Path(spec.origin if spec and spec.origin else "")
        return SourceModule(name, path) if path.suffix == ".py" else None
    except (ImportError, OSError, SyntaxError, ValueError):  # the import says what is wrong
        return None


def look_up(module: str, name: str) -> Any:
    """Returns what a name in a module stands for, as `SourceModule` reads it; raises `KeyError` if it is not found."""
    # Modules of the standard library and pydantic are imported quickly, or are imported already.
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "pydantic":
        return vars(importlib.import_module(module))[name]
    source = read_module(module)
    if source is None:
        raise KeyError(name)
    return source[name]
