"""Command lines that cannot be understood are errors like all others: of one line, that says what to do."""

from __future__ import annotations

import argparse
from typing import NoReturn

from spfs.errors import UsageError


class Parser(argparse.ArgumentParser):
    """UsageError instead of argparse's usage text and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"cannot understand the command line: {message}", f"see {self.prog} --help")
