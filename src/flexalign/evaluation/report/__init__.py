"""The report of one or several sweeps: a page that opens from disk, and a picture for papers."""

from flexalign.evaluation.report.render import write_report

__all__ = ["write_report"]
