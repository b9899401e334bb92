"""Failures that one line explains: `train.py` prints the line, without a traceback, and exits non-zero."""


class Failure(Exception):
    """Something that went wrong in a way the user can act on; its text is one line."""


class OptionError(Failure, ValueError):
    """Names the option, its value (as it would be given) and what is allowed."""

    def __init__(self, option: str, value: object, allowed: str):
        given = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        super().__init__(f"{option}={given}: {allowed}")

    def within(self, group: str) -> "OptionError":
        """The same of the option as it is called in this group of `conf/`."""
        return _restore(f"{group}.{self}")

    def __reduce__(self):  # the default would call __init__ with the finished line when a worker sends the error home
        return _restore, self.args


def _restore(line: str) -> OptionError:
    error = OptionError.__new__(OptionError)
    error.args = (line,)
    return error


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__
