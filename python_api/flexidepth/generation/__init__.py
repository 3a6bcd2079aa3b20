"""Generation: parameters, decoder loop, streaming text, caches, outputs."""
