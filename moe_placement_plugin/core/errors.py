"""The one exception that a user sees."""


class PlacementError(ValueError):
    """A request that cannot be honoured.

    The message names the offending value, the rule that it breaks and how to mend it. It is raised
    before the model loads; nothing has been written or patched when it is raised.
    """
