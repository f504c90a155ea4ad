"""Timelines: generations recorded step by step, run again from any step with a change, and where two diverge."""

from glmlens.timeline.recorder import schedule_edits
from glmlens.timeline.timeline import Divergence, Timeline, find_divergence, record_timeline

__all__ = ["Divergence", "Timeline", "find_divergence", "record_timeline", "schedule_edits"]
