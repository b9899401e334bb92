"""Exports the student of a run, or any network, as files for a device."""
