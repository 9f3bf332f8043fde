"""Warnings of what a guest can bring about as often as it likes: only the first are logged, a host's disk is finite."""

from logging import DEBUG, INFO, WARNING, Logger

MOST = 10


class Sparing:
    """A logger's `warning` that says MOST things, then that it says no more; the rest is for those who debug."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._said = 0

    def __repr__(self) -> str:
        return f"<Sparing said={self._said}>"

    def __call__(self, message: str, *arguments: object) -> None:
        """Log a warning, as `Logger.warning` does, unless there have been too many."""
        self._said += 1
        self._logger.log(WARNING if self._said <= MOST else DEBUG, message, *arguments)
        if self._said == MOST:
            self._logger.log(INFO, "further warnings of this kind are logged at level debug")
