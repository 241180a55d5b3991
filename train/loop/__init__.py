"""The loop of a run: `fit`, its start, the sending of steps to the device, and when it logs, evaluates and saves."""
