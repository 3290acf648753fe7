"""A ladder of recipes over seeds: what is compared, its runs, its statistics, its table and plot."""

from .command import main

__all__ = ["main"]
