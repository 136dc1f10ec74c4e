"""Errors of this package.

ClusterError
└── ModelExportError    the default model could not be made

Messages say the subject, the numbers and the remedy. Constructors take positional
arguments only, so that an error survives pickling between processes.
"""


class ClusterError(Exception):
    """Any failure that this package reports."""


class ModelExportError(ClusterError):
    """The default model could not be downloaded, read or written."""
