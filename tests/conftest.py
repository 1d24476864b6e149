"""Fixtures that several test files share."""

from hub.fixtures import hub, stand_ins

__all__ = ["hub", "stand_ins"]
