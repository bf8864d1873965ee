"""One thin module for each command: it parses, calls and prints. Nothing is decided here."""
