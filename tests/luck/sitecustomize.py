"""Gives the processes that tests start the same luck."""

import luck  # noqa: F401
