"""Which items score highest: exact top-K over an item table or an index of it."""
