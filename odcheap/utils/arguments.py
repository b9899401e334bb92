"""Checks arguments against the types and ranges in a signature, such as `Annotated[float, Field(gt=0)]`."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from odcheap.utils.errors import OptionError

StudentCount = Annotated[int, Field(ge=1, le=100)]  # more are probably a typing error, and would fill the memory

Target = TypeVar("Target", bound=Callable[..., Any])
_CONFIG = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def check_value(option: str, value: Any, annotation: Any, adapter: TypeAdapter[Any] | None = None) -> None:
    """Raises `OptionError` if a value does not have the type and the range that an annotation allows.

    Values are not converted: "5" and 5.0 are not accepted as int, and True is not accepted as a number. Numbers must be
    finite.

    Args:
        option: The name of the option, for the message.
        value: The value to check.
        annotation: A type, or `Annotated` with constraints of pydantic.
        adapter: A `TypeAdapter` of the annotation, which saves time if it is used more than once. None to build it
            here.

    Example:
        >>> from pydantic import Field
        >>> check_value("optimizer.lr", 0.1, Annotated[float, Field(gt=0)])
        >>> check_value("optimizer.lr", 0, Annotated[float, Field(gt=0)])
        Traceback (most recent call last):
        odcheap.utils.errors.OptionError: optimizer.lr=0: must be a number, above 0
    """
    # The lists of a config are `ListConfig` objects, which pydantic does not take for lists.
    plain = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes | tuple) else value
    try:
        (adapter or TypeAdapter(annotation, config=_CONFIG)).validate_python(plain)
        is_valid = not isinstance(value, float) or math.isfinite(value)
    except ValidationError:
        is_valid = False
    if not is_valid:
        raise OptionError(option, value, f"must be {describe_allowed(annotation)}")


def describe_allowed(annotation: Any) -> str:
    """Describes the values that a type annotation allows, in words that fit after "must be".

    Example:
        >>> from pydantic import Field
        >>> describe_allowed(Annotated[float, Field(ge=0, lt=1)] | None)
        'a number, 0 or more and below 1, or null'
        >>> describe_allowed(Literal["auto", "fit"])
        'one of auto, fit'
    """
    # A type with a range, a union, a list of names, a list of entries, or a plain type.
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = _describe_limits(arguments[1:])
        return f"{describe_allowed(arguments[0])}, {limits}" if limits else describe_allowed(arguments[0])
    if origin in (Union, UnionType):
        choices = [choice for choice in arguments if choice is not type(None)]
        # `Literal["auto"] | bool` is one list of names, "one of auto, true, false".
        end = ", or null" if type(None) in arguments else ""
        if any(get_origin(choice) is Literal for choice in choices) and all(
            choice is bool or get_origin(choice) is Literal for choice in choices
        ):
            names = [name for choice in choices for name in (get_args(choice) or ("true", "false"))]
            return f"one of {', '.join(map(str, names))}{end}"
        texts = list(map(describe_allowed, choices))
        return (", or " if any("," in text for text in texts) else " or ").join(texts) + end
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in arguments)}"
    if origin is tuple and Ellipsis not in arguments:
        texts = list(map(describe_allowed, arguments))
        entries = f", each {texts[0]}" if len(set(texts)) == 1 else f": {', '.join(texts)}"
        return f"a list of exactly {len(texts)} entries{entries}"
    if origin in (list, tuple, Sequence) and arguments:
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
    least, most = limits.get("min_length"), limits.get("max_length")
    if least is not None and least == most:
        return f"exactly {least} entries"
    if least == 1 and most is None:
        return "not empty"
    return " and ".join(text.format(limits[name]) for name, text in LIMITS.items() if name in limits)


def check_arguments(group: str) -> Callable[[Target], Target]:
    """Returns a decorator, for a function or a class, that checks the arguments of each call by their annotations.

    A wrong argument raises `OptionError`. Only arguments whose annotation is `Annotated` or `Literal` are checked. For
    a class, the arguments of its constructor are checked. The decorator is for calls from Python; options of the
    command line are checked earlier, by `check_options`.

    Args:
        group: The config group of the options, such as "optimizer", for messages; "" if they belong to no group.
    """

    def decorate(target: Target) -> Target:
        function = target.__init__ if inspect.isclass(target) else target
        signature = inspect.signature(function)

        @functools.cache
        def read_constraints() -> dict[str, tuple[Any, TypeAdapter[Any]]]:
            # Annotations are read at the first call, since they may name what is defined later in the module.
            hints = get_type_hints(function, include_extras=True).items()
            constrained = {name: hint for name, hint in hints if name != "return" and _is_constrained(hint)}
            return {name: (hint, TypeAdapter(hint, config=_CONFIG)) for name, hint in constrained.items()}

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            for name, (annotation, adapter) in read_constraints().items():
                if name in arguments:
                    check_value(f"{group}.{name}".lstrip("."), arguments[name], annotation, adapter)
            return function(*args, **kwargs)

        if not inspect.isclass(target):
            return cast(Target, checked)
        target.__init__ = checked
        return target

    return decorate


def _is_constrained(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return any(_is_constrained(choice) for choice in get_args(annotation))
    return origin in (Annotated, Literal)
