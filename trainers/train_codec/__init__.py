"""Train an autoencoder for entropy-coded records: `tiny-v2`, or one from your own tiles."""
