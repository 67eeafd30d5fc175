"""The stages of this room; each of these modules registers those of its methods."""

from __future__ import annotations

from puna.decode import draft_stages, routing_stages, schedule_stages

__all__ = ["draft_stages", "routing_stages", "schedule_stages"]
