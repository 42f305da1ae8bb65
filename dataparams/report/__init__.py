"""What a run leaves behind: tables, Parquet, plots, and the summary of a sweep."""

from dataparams.report.compare import format_summary, read_sweep, summarize
from dataparams.report.compare_page import compare
from dataparams.report.plots import write_plots
from dataparams.report.rows import (
    SCHEMA_VERSION,
    auroc,
    build_rows,
    detection_results,
    merge_frames,
    read_rows,
    write_rows,
)

__all__ = [
    "SCHEMA_VERSION",
    "auroc",
    "build_rows",
    "compare",
    "detection_results",
    "format_summary",
    "merge_frames",
    "read_rows",
    "read_sweep",
    "summarize",
    "write_plots",
    "write_rows",
]
