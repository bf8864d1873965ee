"""The settings: each in one place, with its name, default, unit, validation and help."""
