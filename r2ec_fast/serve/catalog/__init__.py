"""The items that are recommended: texts, rows of the table, and their changes."""
