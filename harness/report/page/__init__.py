"""From finished runs to their files: summary, tables, plots, and one page to read."""

from harness.report.page.assemble import main, report_noise, write_report

__all__ = ["main", "report_noise", "write_report"]
