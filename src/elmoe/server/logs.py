"""The log on standard error: a line for each request, as text or as JSON. It never holds prompts, answers or keys."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from elmoe.terminal import shown


class _Text(logging.Formatter):
    """``12:00:01 request method=POST status=200``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback behind it where there is one."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        facts = " ".join(f"{name}={_plain(value)}" for name, value in _facts(record).items() if value not in (None, []))
        level = "" if record.levelno < logging.WARNING else record.levelname.lower() + ": "
        line = f"{time} {level}{record.getMessage()}{' ' + facts if facts else ''}"
        return shown(line) + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


class _Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever happened."""
        data = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "message": record.getMessage(), **_facts(record),
        }  # fmt: skip
        if record.exc_info:
            data["traceback"] = self.formatException(record.exc_info)
        return json.dumps(data, default=str)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, "facts", {})
    return found


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def configure(as_json: bool, level: int = logging.INFO) -> None:
    """Log to standard error: what the server tells, and warnings of others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("elmoe").setLevel(level)
    handler.addFilter(_worth_telling)


def _worth_telling(record: logging.LogRecord) -> bool:
    """What clients send that is no HTTP is their fault, and no news; what the second signal cancels was to be cancelled."""
    told = record.getMessage()
    if record.exc_info and record.exc_info[0] is not None and issubclass(record.exc_info[0], asyncio.CancelledError):
        return False
    if told.rstrip().endswith("CancelledError"):  # a traceback that is the message itself
        return False
    return "Invalid HTTP request" not in told and "Unsupported upgrade" not in told
