"""The stages of this room; each of these modules registers those of its methods."""

from __future__ import annotations

from puna.decode import cached_stages, draft_stages, question_stages, routing_stages, schedule_stages

__all__ = ["cached_stages", "draft_stages", "question_stages", "routing_stages", "schedule_stages"]
