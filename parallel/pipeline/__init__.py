"""Pipeline parallelism: settings, timetables of stages and micro-batches, and the engine that runs a timetable."""

from sapwood.parallel.pipeline.settings import Pipeline

__all__ = ["Pipeline"]
