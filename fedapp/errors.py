"""The errors that users see: one sentence that names the value, the bound and the repair."""


class FedappError(Exception):
    """Anything the user can mend; the command line prints it as one line."""


class ConfigError(FedappError):
    """A setting is missing, unknown or out of range."""


class DataError(FedappError):
    """Data is missing, unreadable or not what the task needs."""


class RoundLost(FedappError):  # noqa: N818
    """Too few clients of a round were left, and nothing of it was opened; the next round may have more."""


class DecodeError(FedappError):
    """Bytes from outside that are not a packet this codec made for this model."""
