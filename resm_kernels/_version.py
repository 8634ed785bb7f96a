"""The version, in the one place that packaging and the package read it from."""

__version__ = "0.2.0"
