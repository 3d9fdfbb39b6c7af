"""What a run leaves to read: report.json, the model card, and the table at its end."""

from llmslim.report.card import write_report
from llmslim.report.tables import plan_table, summary_table

__all__ = ["plan_table", "summary_table", "write_report"]
