"""Other runtimes on the same weights and precision, timed in the same run; see docs/peers.md.

setup = PeerSetup(checkpoint, dtype, positions)
peers, missing = available(peer_names(dtype), setup)
cases, failed = decode_cases(peers, depth, threads)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..timing import Case
from .base import MissingPeer, Peer, PeerSetup, PeerUnavailable, Session
from .ctranslate2 import CTranslate2
from .llamacpp import LlamaCpp
from .onnxruntime_genai import OnnxRuntimeGenAI
from .openvino_genai import OpenVinoGenAI, OpenVinoGenAIFloat32
from .transformers import TransformersCompile, TransformersEager, TransformersEagerFloat32

__all__ = [
    "PEERS",
    "MissingPeer",
    "Peer",
    "PeerSetup",
    "PeerUnavailable",
    "Session",
    "available",
    "decode_cases",
    "peer_names",
    "prompt_cases",
]

PEERS: dict[str, Callable[[PeerSetup], Peer]] = {
    "transformers-eager": TransformersEager,
    "transformers-eager-float32": TransformersEagerFloat32,
    "transformers-compile": TransformersCompile,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVinoGenAI,
    "openvino-float32": OpenVinoGenAIFloat32,
    "onnxruntime": OnnxRuntimeGenAI,
    "ctranslate2": CTranslate2,
}
_FLOAT32 = "-float32"


def peer_names(dtype: torch.dtype) -> list[str]:
    """All of PEERS that differ from each other in a run with weights of `dtype`."""
    return [name for name in PEERS if dtype != torch.float32 or not name.endswith(_FLOAT32)]


def available(
    names: Iterable[str], setup: PeerSetup, notify: Callable[[str], None] | None = None
) -> tuple[list[Peer], list[MissingPeer]]:
    """The peers that are installed and have their files, and a row for each that cannot run.

    names: keys of PEERS. notify: gets a line for each peer before it is prepared: a first conversion takes time.
    """
    peers, missing = [], []
    for name in names:
        if notify is not None:
            notify(f"preparing {name}")
        try:
            peers.append(PEERS[name](setup))
        except PeerUnavailable as error:
            missing.append(MissingPeer(name, str(error)))
        except Exception as error:  # others' code
            reason = str(PeerUnavailable(f"{type(error).__name__}: {error}"))
            missing.append(MissingPeer(name, reason))
    return peers, missing


def decode_cases(
    peers: Iterable[Peer], depth: int, threads: int
) -> tuple[list[Case], list[MissingPeer]]:
    """A tried decode case of each peer, and a row for each that failed."""
    return _cases(peers, lambda peer: peer.decode_case(depth, threads), threads)


def prompt_cases(
    peers: Iterable[Peer], tokens: int, threads: int
) -> tuple[list[Case], list[MissingPeer]]:
    """A tried prompt case of each peer, and a row for each that failed."""
    return _cases(peers, lambda peer: peer.prompt_case(tokens, threads), threads)


def _cases(
    peers: Iterable[Peer], make: Callable[[Peer], Case], threads: int
) -> tuple[list[Case], list[MissingPeer]]:
    cases, failed = [], []
    for peer in peers:
        try:
            cases.append(make(peer))
        except PeerUnavailable as error:
            failed.append(MissingPeer(peer.name, str(error), threads))
    return cases, failed
