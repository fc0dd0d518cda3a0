"""Pictures and pages of what a conversion costs and keeps."""

from sadmoe.report.page import Heat, Page, write_page
from sadmoe.report.plots import Panel, Series, matplotlib_pyplot, plot_curves

__all__ = ["Heat", "Page", "Panel", "Series", "matplotlib_pyplot", "plot_curves", "write_page"]
