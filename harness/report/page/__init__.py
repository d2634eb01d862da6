"""From finished runs to their files: summary, tables, plots, and one page to read."""

from harness.report.page.assemble import main, write_report

__all__ = ["main", "write_report"]
