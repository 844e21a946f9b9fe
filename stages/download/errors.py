"""What this stage raises when a source cannot be used."""

from pipeline.errors import InputError


class SourceError(InputError):
    """A source of photographs or pairs cannot be used; the message names it and says what would be right."""


class DamagedError(SourceError):
    """A file is not what it should be: cut short, damaged or malformed. To get it again may help."""
