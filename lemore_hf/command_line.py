# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the scripts have in common: options that are numbers within bounds, errors that are one line, and tables."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import signal
import sys
from collections.abc import Callable, Sequence

from huggingface_hub.errors import StrictDataclassError

from .interruption import Interrupted


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `minimum` on."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return int(text)

    return integer


def positive(text: str) -> float:
    """The type of an option that takes finite numbers above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return float(text)


def run_script(main: Callable[[], int | None], *expected: type[Exception], interrupted: str | None = None) -> None:
    """Run a script's `main`, and exit with the status that it returns, if any. What a user can put right ends it in one
    line instead of a traceback, and Ctrl-C or another signal with the status that a shell knows.

    Args:
        main: takes its arguments from the command line.
        expected: errors that tell the user what to do, beside those of a wrong value or type, of files and of packages
            that are not installed.
        interrupted: what to say after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no text
    try:
        if (status := main()) is not None:
            sys.exit(status)
    except (ImportError, OSError, StrictDataclassError, TypeError, ValueError, *expected) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except (Interrupted, KeyboardInterrupt) as error:
        if interrupted:
            with contextlib.suppress(OSError):  # the terminal may be what is gone
                print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(128 + getattr(error, "number", signal.SIGINT))


def markdown_table(rows: Sequence[Sequence[str]], num_texts: int, padded: bool = True) -> str:
    """A table in Markdown, its titles the first row.

    Args:
        rows: of cells.
        num_texts: columns of text, to the left; those after them hold numbers, which stand to the right.
        padded: whether the source reads as a table, too.
    """
    columns = []
    for index, cells in enumerate(zip(*rows, strict=True)):
        is_number = index >= num_texts
        width = max(map(len, cells)) if padded else 3 + is_number
        if padded:
            cells = [cell.rjust(width) if is_number else cell.ljust(width) for cell in cells]
        columns.append([cells[0], "-" * (width - is_number) + ":" * is_number, *cells[1:]])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))
