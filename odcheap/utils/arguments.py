"""Checks values against the type and the range that a signature gives them, such as `Annotated[float, Field(gt=0)]`."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from odcheap.utils.errors import OptionError

Target = TypeVar("Target", bound=Callable[..., Any])
_CONFIG = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check_value(option: str, value: Any, annotation: Any) -> None:
    """Raises `OptionError` unless the value has the annotated type and range.

    Nothing is converted: "5" and 5.0 are no int, True is no number. Numbers must be finite.

    Example:
        >>> from pydantic import Field
        >>> check_value("optimizer.lr", 0.1, Annotated[float, Field(gt=0)])
        >>> check_value("optimizer.lr", 0, Annotated[float, Field(gt=0)])
        Traceback (most recent call last):
        odcheap.utils.errors.OptionError: optimizer.lr=0: must be a number, above 0
    """
    _validate(option, value, annotation, _make_adapter(annotation))


def _make_adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=_CONFIG)


def _validate(option: str, value: Any, annotation: Any, adapter: TypeAdapter[Any]) -> None:
    """`check_value` with an adapter that is kept, since making one takes longer than the check."""
    plain = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes | tuple) else value
    try:
        adapter.validate_python(plain)
        is_valid = not isinstance(value, float) or math.isfinite(value)
    except ValidationError:
        is_valid = False
    if not is_valid:
        raise OptionError(option, value, f"must be {describe_allowed(annotation)}")


def describe_allowed(annotation: Any) -> str:
    """Describes the values that an annotation allows, as the end of a sentence.

    Example:
        >>> from pydantic import Field
        >>> describe_allowed(Annotated[float, Field(ge=0, lt=1)] | None)
        'a number, 0 or more and below 1, or null'
        >>> describe_allowed(Literal["auto", "fit"])
        'one of auto, fit'
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = _describe_limits(arguments[1:])
        return f"{describe_allowed(arguments[0])}, {limits}" if limits else describe_allowed(arguments[0])
    if origin in (Union, UnionType):
        choices = [choice for choice in arguments if choice is not type(None)]
        end = ", or null" if type(None) in arguments else ""
        if any(get_origin(choice) is Literal for choice in choices) and all(
            choice is bool or get_origin(choice) is Literal for choice in choices
        ):
            names = [name for choice in choices for name in (get_args(choice) or ("true", "false"))]
            return f"one of {', '.join(map(str, names))}{end}"
        return " or ".join(map(describe_allowed, choices)) + end
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in arguments)}"
    if origin in (list, tuple) and arguments:
        return f"a list of entries, each {describe_allowed(arguments[0])}"
    return TYPE_NAMES.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


LIMITS = {
    "gt": "above {:g}",
    "ge": "{:g} or more",
    "lt": "below {:g}",
    "le": "at most {:g}",
    "min_length": "{} entries or more",
    "max_length": "{} entries or fewer",
}


def _describe_limits(metadata: tuple[Any, ...]) -> str:
    limits: dict[str, Any] = {}
    for entry in metadata:
        for constraint in entry.metadata if isinstance(entry, FieldInfo) else [entry]:
            limits |= {name: getattr(constraint, name) for name in LIMITS if hasattr(constraint, name)}
    return " and ".join(text.format(limits[name]) for name, text in LIMITS.items() if name in limits)


def check_arguments(group: str) -> Callable[[Target], Target]:
    """Returns a decorator that checks a function's arguments whose annotation is `Annotated` or `Literal`.

    On a class it checks the constructor's. For direct use from Python: on the command line the same annotations are
    checked before anything is built.

    Args:
        group: The config group that the options belong to, for messages; "" for none.
    """

    def decorate(target: Target) -> Target:
        if inspect.isclass(target):
            target.__init__ = _checked(target.__init__, group)
            return target
        return _checked(target, group)

    return decorate


def _checked(function: Callable[..., Any], group: str) -> Any:
    signature = inspect.signature(function)

    @functools.cache
    def constrained() -> dict[str, tuple[Any, TypeAdapter[Any]]]:
        """The annotations that say more than a type; read at the first call, when all names are defined."""
        hints = get_type_hints(function, include_extras=True)
        hints = {name: hint for name, hint in hints.items() if name != "return" and _is_constrained(hint)}
        return {name: (hint, _make_adapter(hint)) for name, hint in hints.items()}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name, (annotation, adapter) in constrained().items():
            if name in given:
                _validate(f"{group}.{name}" if group else name, given[name], annotation, adapter)
        return function(*args, **kwargs)

    return call


def _is_constrained(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return any(_is_constrained(choice) for choice in get_args(annotation))
    return origin in (Annotated, Literal)
