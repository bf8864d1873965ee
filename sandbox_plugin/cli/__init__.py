"""One thin module for each command: it parses, calls and prints. Nothing about devices is decided here."""
