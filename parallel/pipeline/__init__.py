"""Pipelines: their settings, the timetable of stages and micro-batches, and the engine that runs it."""
