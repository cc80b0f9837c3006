"""The exceptions fastldm raises on purpose.

Each message is one line: what was given, what is accepted, what to do. The command line prints it and exits
with 2.
"""

from __future__ import annotations


class FastLDMError(Exception):
    """Base of every error that a user can act on."""


class InputError(FastLDMError, ValueError):
    """A prompt, picture, flag or file that cannot be used."""


class InputTypeError(InputError, TypeError):
    """An argument of a kind that is not taken, such as text for a number."""


class ConfigError(FastLDMError, ValueError):
    """Unknown or inconsistent configuration keys."""


class CheckpointError(FastLDMError):
    """Weights that do not fit the model, or that cannot be read or written."""


class UnsupportedError(FastLDMError, NotImplementedError):
    """A backend asked for by name, or an operation, cannot do this call."""


class TrainingError(FastLDMError, RuntimeError):
    """Training cannot go on, for example after a loss that is not finite."""


class BuildError(FastLDMError, RuntimeError):
    """The C++ kernels cannot be compiled."""
