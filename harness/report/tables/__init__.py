"""The tables of a run as plain text, ready for any format; every caption states the setting."""
