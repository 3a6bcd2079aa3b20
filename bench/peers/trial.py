"""Open a peer's session and take two steps: `python -m bench.peers.trial '[module, class, arguments]'`."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module


def main(wanted: str) -> None:
    """Make the session that `wanted` describes and use it once."""
    module, name, arguments = json.loads(wanted)
    session = getattr(import_module(module), name)(**arguments)
    session.start([1, 2, 3])
    session.step()
    session.step()
    session.close()


if __name__ == "__main__":
    main(sys.argv[1])
    # Other runtimes' threads can crash while the interpreter goes down; what was asked has worked.
    sys.stdout.flush()
    os._exit(0)
