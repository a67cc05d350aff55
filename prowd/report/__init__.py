"""The report: one page that shows what runs came to, made from their records."""

from prowd.report.page import write_page

__all__ = ["write_page"]
