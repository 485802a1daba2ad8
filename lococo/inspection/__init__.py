"""Looking into the slots: which tokens each holds, and how strongly."""

from lococo.inspection.trace import Trace, trace

__all__ = ["Trace", "trace"]
