"""Memory and time of loading a model, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from flexidepth.errors import FlexiDepthError

_SCRIPT = """
import json, sys, time
def status():
    lines = open('/proc/self/status', encoding='ascii').read().splitlines()
    pairs = (line.partition(':') for line in lines)
    return {k: int(v.split()[0]) * 1024 for k, _, v in pairs if k in ('VmHWM', 'VmRSS')}
import torch
from flexidepth.checkpoints import open_checkpoint
from flexidepth_ext.engine import Engine
from flexidepth.llm import FlexiDepth
open_checkpoint(sys.argv[1]).tokenizer()  # imports of the tokenizer's library are not the model's memory
before = status()['VmRSS']
begin = time.perf_counter()
llm = FlexiDepth.from_pretrained(sys.argv[1], dtype=sys.argv[2])
seconds = time.perf_counter() - begin
prompt, new = min(512, llm.max_length // 2), min(64, llm.max_length // 4)
cache = llm.new_cache(prompt + new)
llm.generate([1] * prompt, cache=cache, max_new_tokens=new, eos_token_id=-1, force_routing='all')
print(json.dumps({
    'prompt_tokens': prompt, 'new_tokens': new,
    'load_s': seconds, 'peak_bytes': status()['VmHWM'] - before,
    'weight_bytes': llm.engine.weight_bytes, 'cache_bytes': cache.nbytes,
}))
"""


def measure_memory(model: str, dtype: str) -> dict[str, Any] | None:
    """Cost of loading and generating; None where the system has no /proc. FlexiDepthError where that process failed.

    Seconds to load (files warm), peak resident bytes above the imports, bytes of weights and cache
    with a prompt of 512 tokens and 64 new ones (fewer where the model has too few positions).
    """
    if not sys.platform.startswith("linux"):
        return None
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, model, dtype], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        last = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
        raise FlexiDepthError(f"bench: the memory measurement failed: {last[0]}")
    figures: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    figures["peak_over_weights_and_cache"] = figures["peak_bytes"] / (
        figures["weight_bytes"] + figures["cache_bytes"]
    )
    return figures
