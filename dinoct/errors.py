"""Errors that are meant for the user: one line each, naming the setting to change."""


class DinoctError(Exception):
    """A user-facing error: its message is one line and says what to do."""


class ConfigError(DinoctError):
    """A setting is wrong; the message names the key."""


class CheckpointError(DinoctError):
    """A file is not a checkpoint, is damaged, or does not fit the model."""
