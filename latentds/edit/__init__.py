"""Finished data sets into others: merge, repack, extract, export."""
