"""Where patches come from, one file an input kind, and the record all of them yield."""
