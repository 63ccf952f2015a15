"""The report of one or many runs: a page and its pictures.  No torch."""

from megatron_phf.report.demo import plot_demo

__all__ = ["plot_demo"]
