"""Logs: JSON lines to stdout, pretty in a terminal. One line per request says what became of it; never its text."""

import sys
from typing import Any

import structlog
from structlog.typing import FilteringBoundLogger

Logger = FilteringBoundLogger


def configure(level: str = "info") -> None:
    """Set up logging for this process, once, before anything logs."""
    renderer: Any = (
        structlog.dev.ConsoleRenderer() if sys.stdout.isatty() else structlog.processors.JSONRenderer(sort_keys=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(),
        cache_logger_on_first_use=True,
    )


def logger(service: str, **bound: object) -> Logger:
    """A logger that says which service speaks."""
    return structlog.get_logger(service=service, **bound)
