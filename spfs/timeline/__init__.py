"""What became of a delayed mount, drawn from its record: as a page, a picture, a trace, or text.

Nothing here talks to a manager; ``story`` reads the record, the other modules draw it.
"""
