"""Failures a person can mend."""


class InputError(ValueError):
    """Something given cannot be used: a file, a parameter, a machine without what was asked for.

    The message names it and says what would be right. Commands print the message alone and exit with 1; any other
    exception is a defect of ours and keeps its traceback.
    """


def said(error: InputError | OSError) -> str:
    """What a person reads of a failure: of one of the system's the file and the reason, without its number."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
