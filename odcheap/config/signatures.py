"""The parameters of classes and functions: read by an import, or from source files, since PyTorch takes seconds."""

import ast
import builtins
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

from odcheap.utils.errors import OptionError, first_line
from odcheap.utils.parts import OWN_PACKAGE, import_target

# Decorators that do not change a signature. What has others is not read from the source.
TRANSPARENT_DECORATORS = {"check_arguments", "dataclass", "_defaults_from_env_vars"}


class Signature(NamedTuple):
    """The parameters of a class or function.

    If a constructor passes `**options` on to its base class, the parameters of the base class are included.

    Attributes:
        annotations: The type and range of each parameter, as far as they are known.
        names: The names of all parameters.
        keyword_only: The names of those that must be given by name.
        takes_any: Whether it accepts arguments with other names.
    """

    annotations: dict[str, Any]
    names: set[str]
    keyword_only: set[str]
    takes_any: bool


UNKNOWN = Signature({}, set(), set(), takes_any=True)
NO_PARAMETERS = Signature({}, set(), set(), takes_any=False)


def import_signature(path: str, target: str) -> Signature:
    """Imports the class or function that the `_target_` of a part names, and returns its parameters.

    Args:
        path: The dotted name of the part in the config, for messages.
        target: The Python path of the class or function.

    Raises:
        OptionError: It cannot be imported.
    """
    try:
        return inspect_signature(import_target(target))
    except (ImportError, AttributeError) as error:
        allowed = f"cannot be imported ({first_line(error)}){OWN_PACKAGE}"
        raise OptionError(f"{path}._target_", target, allowed) from error


def inspect_signature(target: Callable[..., Any]) -> Signature:
    """Returns the parameters of a class or function."""
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
                with suppress(NameError):
                    hints[parameter.name] = eval(hint, function.__globals__) if isinstance(hint, str) else hint
        keyword_only = {p.name for p in named if p.kind is p.KEYWORD_ONLY}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        found.append(Signature(hints, {p.name for p in named}, keyword_only, takes_any))
        if not takes_any:
            break
    return join_signatures(found)


def join_signatures(signatures: list[Signature]) -> Signature:
    """Returns the signature of a constructor that passes `**options` on to the constructors after it in the list."""
    annotations: dict[str, Any] = {}
    for signature in signatures:
        annotations = {**signature.annotations, **annotations}
    names = set().union(*(signature.names for signature in signatures))
    return Signature(annotations, names, signatures[0].keyword_only, signatures[0].takes_any)


def read_signature(_: str, target: str) -> Signature:
    """Returns the parameters of a class or function, read from its source file; nothing is imported.

    What cannot be read from the source is left out, such as the annotation of a parameter by a name that a library
    computes. If the class or function itself is not found, the result allows everything.

    Args:
        _: Not used; the function can thus be called in place of `import_signature`.
        target: The Python path of the class or function, such as `odcheap.methods.od.OnlineDistillation`.
    """
    module, _, name = target.rpartition(".")
    found = find_definition(read_module(module), name)
    signatures: list[Signature] = []
    for signature in iterate_signatures(*found) if found else ():
        signatures.append(signature)
        if not signature.takes_any:
            break
    return join_signatures(signatures) if signatures else UNKNOWN


class SourceModule(dict[str, Any]):
    """The source of a module, as a namespace in which its annotations are evaluated.

    A name is a class of Python, a constant of the module, or a name that it imports from another module. A class that
    the source of some module defines is represented by an empty class of this name.

    Args:
        name: The dotted name of the module.
        path: Its source file.
    """

    def __init__(self, name: str, path: Path):
        super().__init__(vars(builtins))
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
                self[name] = type(name, (), {})
            elif isinstance(node, ast.ImportFrom) and (original := find_import(node, name)):
                self[name] = look_up(self.name_origin(node), original)
            if name in self:
                return self[name]
        raise KeyError(name)

    def name_origin(self, node: ast.ImportFrom) -> str:
        """Returns the dotted name of the module from which a statement imports."""
        parents = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
        return ".".join([*parents, *filter(None, [node.module])])

    def evaluate(self, expression: ast.expr) -> Any:
        """Returns the value of an expression; raises `NameError` or `KeyError` if it has a name that is not known."""
        return eval(ast.unparse(expression), {"__builtins__": {}}, self)

    def evaluate_known(self, annotations: Mapping[str, ast.expr | None]) -> dict[str, Any]:
        """Returns the values of those annotations that can be evaluated, by the names of the parameters."""
        known: dict[str, Any] = {}
        for name, annotation in annotations.items():
            if annotation is not None:
                with suppress(NameError, KeyError, AttributeError, TypeError):
                    known[name] = self.evaluate(annotation)
        return known


@functools.cache
def read_module(name: str) -> SourceModule | None:
    """Returns the source of a module; None if there is none."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)  # of a package that contains no other, so that nothing is imported
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        paths = [Path(spec.origin)] if spec and spec.origin and not rest else []
    else:
        folders = [Path(folder).joinpath(*rest) for folder in spec.submodule_search_locations]
        paths = [path for folder in folders for path in (folder / "__init__.py", folder.with_suffix(".py"))]
    path = next((path for path in paths if path.suffix == ".py" and path.is_file()), None)
    try:
        return SourceModule(name, path) if path else None
    except (OSError, SyntaxError, ValueError):  # the import says what is wrong
        return None


def look_up(module: str, name: str) -> Any:
    """Returns the class or constant that has a name in a module, to evaluate annotations that contain it.

    Args:
        module: The dotted name of the module.
        name: The name in this module.

    Raises:
        KeyError: It is not known.
    """
    # Modules of the standard library and pydantic are imported quickly, or are imported already.
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "pydantic":
        return vars(importlib.import_module(module))[name]
    source = read_module(module)
    if source is None:
        raise KeyError(name)
    return source[name]


def find_definition(
    source: SourceModule | None, name: str, depth: int = 10
) -> tuple[SourceModule, ast.ClassDef | ast.FunctionDef] | None:
    """Returns the definition of a class or function, and the module in which it stands; None if it is not found.

    Args:
        source: A module that defines it or imports it from another one.
        name: The name of the class or function.
        depth: The number of modules through which imports are followed at most.
    """
    if source is None or not depth:
        return None
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return source, node
        if isinstance(node, ast.ImportFrom) and (original := find_import(node, name)):
            return find_definition(read_module(source.name_origin(node)), original, depth - 1)
    return None


def find_import(node: ast.ImportFrom, name: str) -> str | None:
    """Returns the original name of what a statement imports as `name`; None if it imports nothing as `name`.

    Args:
        node: The statement, such as `from package import original as name`.
        name: The name in the module that contains the statement.
    """
    return next((alias.name for alias in node.names if name == (alias.asname or alias.name)), None)


def iterate_signatures(source: SourceModule, node: ast.ClassDef | ast.FunctionDef) -> Iterator[Signature]:
    """Yields the parameters of a function, or of the constructors of a class and of its base classes.

    Args:
        source: The module in which the definition stands.
        node: The definition.

    Yields:
        The parameters; `UNKNOWN`, as the last one, if a constructor cannot be read.
    """
    is_class = isinstance(node, ast.ClassDef)
    inner = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    constructor = next(iter(inner), None) if is_class else node
    decorators = [
        ast.unparse(decorator).partition("(")[0] for part in {node, *inner} for decorator in part.decorator_list
    ]
    if not set(decorators) <= TRANSPARENT_DECORATORS:
        yield UNKNOWN
    elif isinstance(constructor, ast.FunctionDef):
        arguments = constructor.args
        named = [*arguments.posonlyargs, *arguments.args][is_class:] + arguments.kwonlyargs  # without `self`
        annotations = {a.arg: a.annotation for a in named}
        keyword_only = {a.arg for a in arguments.kwonlyargs}
        yield Signature(source.evaluate_known(annotations), {*annotations}, keyword_only, arguments.kwarg is not None)
        yield from iterate_base_signatures(source, node)
    elif "dataclass" in decorators:  # those of base classes are left out
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
        annotations = {cast(ast.Name, field.target).id: field.annotation for field in fields}
        yield Signature(source.evaluate_known(annotations), {*annotations}, set(), takes_any=False)
    else:
        yield from iterate_base_signatures(source, node)


def iterate_base_signatures(source: SourceModule, node: ast.ClassDef | ast.FunctionDef) -> Iterator[Signature]:
    """Yields the parameters of the constructors of base classes; see `iterate_signatures`."""
    for base in node.bases if isinstance(node, ast.ClassDef) else ():
        found = find_definition(source, base.id) if isinstance(base, ast.Name) else None
        if found is None:
            yield UNKNOWN
            return
        yield from iterate_signatures(*found)
