"""Warnings of the daemon's first moments: they wait until logging is there, which nothing else needs so early."""

_held: "list[tuple[str, str]] | None" = None


def hold() -> None:
    """Keep warnings from now on, until release()."""
    global _held  # noqa: PLW0603  # one process, one log
    _held = []


def release() -> None:
    """Log what has been kept; logging has been set up."""
    global _held  # as above
    held, _held = _held or [], None
    for name, text in held:
        warning(name, text)


def warning(name: str, text: str) -> None:
    """Log `text` as a warning of the module `name`, now or as soon as that can be done."""
    if _held is None:
        import logging

        logging.getLogger(name).warning("%s", text)
    else:
        _held.append((name, text))
