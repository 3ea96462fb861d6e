"""What measures collateral damage and vetoes."""

from liveweight.guard.budget import ChangedAnswer, GuardReport
from liveweight.guard.meter import Guard, ProtectedItem
from liveweight.guard.probe_set import Probe, ProbeSet, load_probes

__all__ = ["ChangedAnswer", "Guard", "GuardReport", "Probe", "ProbeSet", "ProtectedItem", "load_probes"]
