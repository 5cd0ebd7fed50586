"""Durations as people read them."""


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from one hour on."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """Seconds in words: 50 s, 2 min 20 s, 3 h 10 min, 2 days 4 h."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 3600:
        return _two_units(10 * round(seconds / 10), 60, "min", "s")
    if seconds < 86400:
        return _two_units(10 * round(seconds / 600), 60, "h", "min")
    return _two_units(round(seconds / 3600), 24, "days", "h")


def _two_units(count: int, size: int, large: str, small: str) -> str:
    many, rest = divmod(count, size)
    return f"{many} {large} {rest} {small}" if rest else f"{many} {large}"
