"""What can go wrong in the demonstration, each as one line for stderr."""

from __future__ import annotations


class DemoError(Exception):
    """A failure that the user can mend; the text is one line for stderr."""


class MissingDependency(DemoError):
    """An optional package is not installed."""

    @classmethod
    def of(cls, package: str, error: ImportError) -> MissingDependency:
        """That for a package, whose import raised `error`."""
        return cls(f'{package} is needed: pip install "sbnet-cupy[demo]" ({brief(error)})')


def brief(error: BaseException) -> str:
    """First line of an error's message, or its kind where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
