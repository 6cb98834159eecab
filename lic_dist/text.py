"""Numbers as text for people."""


def clock(seconds: float) -> str:
    """Return seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(number: int, what: str) -> str:
    """Return a number with its noun: "1 point", "3 points"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
