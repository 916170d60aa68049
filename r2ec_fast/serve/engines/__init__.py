"""Other programs that write reasonings for the server."""
