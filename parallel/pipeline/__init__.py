"""Pipeline parallelism: settings, timetables of stages and micro-batches, and the engine that runs a timetable."""
