"""One module per kind of reference that needs more than to be opened on the new mount and put in place."""
