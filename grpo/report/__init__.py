"""What runs did, for people: `python -m grpo.report RUNS...` writes one HTML page, Markdown and CSV.

read       run folders as they are found: finished, running, failed, half-written, corrupt
compare    the overrides that differ, seeds, intervals, paired differences
diagnosis  known sicknesses in plain words, from metrics rows alone
samples    the questions and completions worth looking at, their clips and per-token figures
page       the HTML file (page.html, page.css, page.js); tables   the Markdown and CSV files
curves     curves.png and the closing lines at the end of a run
"""

from grpo.report.curves import closing_lines, curves
from grpo.report.diagnosis import Finding, Limits, diagnose

__all__ = ["Finding", "Limits", "closing_lines", "curves", "diagnose"]
