"""The stages of this room; each of these modules registers those of its methods."""

from __future__ import annotations

from puna.decode import schedule_stages

__all__ = ["schedule_stages"]
