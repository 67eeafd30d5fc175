"""``report.html``: one self-contained page about a run; and the plot for a README."""

from puna.run.report.page import write_report
from puna.run.report.plot import plot_before_after

__all__ = ["plot_before_after", "write_report"]
