"""From a run to files for a device."""
