"""Batches of a data set: order, selection, workers, decoding on the device, mixtures."""
