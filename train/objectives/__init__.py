"""Objectives: functions ``objective(v, batch) -> (loss, metrics)`` that a trainer minimises."""
