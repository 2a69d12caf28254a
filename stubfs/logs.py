"""How the daemons log: levels by -v, as lines for people or as JSON for machines.

Not -v: what goes wrong. -v: changes of state. -vv: each step. The levels' names are Python's.
"""

from __future__ import annotations

import json
import logging
import select
import time
from typing import List

from stubfs.errors import printable

FORMATS = ("text", "json")
TEXT = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"


def level(verbose: int) -> int:
    return (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]


class TextFormatter(logging.Formatter):
    """One line a message, also where it holds the name of somebody's file. Tracebacks alone have lines of their own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, logger, pid, message, and a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{whole}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up(handlers: List[logging.Handler], verbose: int, form: str) -> None:
    """For the whole process."""
    formatter = JsonFormatter() if form == "json" else TextFormatter(TEXT)
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=level(verbose), handlers=handlers)


class PatientHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Logs to standard error. What nobody takes from there (a full pipe, a stopped terminal) is dropped: whoever logs
    must not wait for whoever reads."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is None:
            return  # Python found no standard error when it started
        poll = select.poll()
        poll.register(self.stream, select.POLLOUT)
        if poll.poll(0):
            super().emit(record)
