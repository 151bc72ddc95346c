"""What the commands have in common: patterns that choose cases, and a device that has to be there."""

from __future__ import annotations

import argparse
import re


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression of a command line."""
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from None


def no_device() -> str:
    """Why there is no device to measure; empty where there is one."""
    from sbnet_cupy._jit import why_unavailable

    return why_unavailable()
