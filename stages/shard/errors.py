"""What sharding ends in when it cannot go on."""

from pipeline.errors import InputError


class ShardError(InputError):
    """The aligned faces cannot be made into a training set; the message says why."""
