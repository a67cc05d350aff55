"""Times as people read them."""


def clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds.

    >>> clock(65.9), clock(5400)
    ('1:05', '1:30:00')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
