"""ItemIndex: a table prepared for searching, that can be written while it is searched."""
