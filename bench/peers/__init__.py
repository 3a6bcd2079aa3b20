"""Other runtimes on the same weights and precision, timed in the same run."""

PEERS: dict[str, object] = {"llama.cpp": None}
