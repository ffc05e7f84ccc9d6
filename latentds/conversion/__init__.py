"""Converting a source into a data set: plan, decode, encode, write, finish."""
