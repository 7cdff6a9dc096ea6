"""Define the one exception that a user sees, and shorten those of others."""


class PlacementError(ValueError):
    """Say why a request cannot be honoured.

    The message names the offending value, the rule that it breaks and how to mend it. It is raised
    before the model loads; nothing has been written or patched when it is raised.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name when it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
