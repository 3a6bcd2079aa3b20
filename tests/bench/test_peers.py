"""Peers: those that cannot run say why, and those that run choose transformers' own tokens. Never a time."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexidepth.base_model import base_model_of
from flexidepth.bench.peers import (
    PEERS,
    MissingPeer,
    Peer,
    PeerSetup,
    PeerUnavailable,
    Session,
    available,
    decode_cases,
    peer_names,
    prompt_cases,
)
from flexidepth.bench.peers import files as peers_files
from flexidepth.bench.peers.base import require, shorten, token_ids
from flexidepth.bench.peers.files import FilePeer, exported, made_once, model_folder, run_apart
from flexidepth.checkpoints import open_checkpoint
from tests.checkpoints.tiny import save_base

DEPTH, STEPS, PROMPT = 40, 6, 24  # more than a block of 32 tokens; a prompt of another length
MODULES = {
    "llama.cpp": ("llama_cpp", "peers"),
    "openvino": ("openvino_genai", "peers-openvino"),
    "openvino-float32": ("openvino_genai", "peers-openvino"),
    "onnxruntime": ("onnxruntime_genai", "peers-onnx"),
    "ctranslate2": ("ctranslate2", "peers-ctranslate2"),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def setup_of(folder: Path, kind: str = "llama", **changes: Any) -> PeerSetup:
    """A tiny model of `kind`, in float32: peers' tokens are then transformers' own."""
    save_base(folder / "model", kind, **{"max_position_embeddings": 256, **changes})
    checkpoint = open_checkpoint(str(folder / "model"))
    return PeerSetup(checkpoint, torch.float32, positions=64, folder=folder / "peers")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> PeerSetup:
    return setup_of(tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def expected(setup: PeerSetup) -> dict[int, list[int]]:
    return {count: greedy(setup, count) for count in (DEPTH, PROMPT)}


@torch.inference_mode()
def greedy(setup: PeerSetup, count: int) -> list[int]:
    """What float32 transformers chooses behind the peers' first `count` ids, without any cache."""
    model = base_model_of(setup.checkpoint.config, setup.checkpoint.tensors())
    ids = token_ids(setup.checkpoint.config.vocab_size, count)
    for _ in range(STEPS + 1):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        two = logits.topk(2).values
        assert two[0] - two[1] > 1e-3, "a tie: another seed is needed"
        ids.append(int(logits.argmax()))
    return ids[count:]


def opened(name: str, setup: PeerSetup) -> Peer:
    """The peer; skips where its package is not installed, and fails where it is and does not run."""
    if name in MODULES:
        pytest.importorskip(MODULES[name][0])
    try:
        return PEERS[name](setup)
    except PeerUnavailable as error:
        if "C++ compiler" in str(error):
            pytest.skip(str(error))
        raise


def run_case(peer: Peer, depth: int, threads: int, steps: int = STEPS) -> list[int]:
    case = peer.decode_case(depth, threads)
    for _ in range(2):  # a second turn begins anew
        case.start()
        for _ in range(steps):
            case.step()
    return list(peer.chosen)


@pytest.mark.parametrize("name", peer_names(torch.float32))
def test_a_peer_chooses_what_transformers_chooses(
    name: str, setup: PeerSetup, expected: dict[int, list[int]]
) -> None:
    peer = opened(name, setup)
    try:
        assert run_case(peer, DEPTH, 1) == expected[DEPTH]
        prompt = peer.prompt_case(PROMPT, 1)
        prompt.step()
        assert peer.chosen == expected[PROMPT][:1]
        assert run_case(peer, DEPTH, 2) == expected[DEPTH]
        assert peer.name == prompt.name
        assert peer.name.endswith(("f32", "float32"))
        assert "f" in peer.precision
        assert peer.version[0].isdigit()
    finally:
        peer.close()


@pytest.mark.parametrize("name", [n for n in MODULES if n != "openvino-float32"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("mistral", {"sliding_window": None}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ],
    ids=["qwen2", "mistral", "llama3-rope"],
)
def test_every_family_is_converted_rightly(
    name: str,
    kind: str,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (name, changes.get("rope_parameters")) == ("ctranslate2", LLAMA3):
        pytest.skip("said to be unavailable, see below")
    monkeypatch.setattr(
        peers_files, "run_apart", lambda *_: None
    )  # no trial; conversions have their own name
    setup = setup_of(tmp_path, kind, **changes)
    peer = opened(name, setup)
    try:
        assert run_case(peer, DEPTH, 1) == greedy(setup, DEPTH)
    finally:
        peer.close()


class Counting(Session):
    """Chooses one more than the token before; fails where it is told to."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.open = fail, True

    def start(self, ids: Any) -> int:
        if self.fail == "start":
            raise RuntimeError("no kernel\n\nfor this")
        self.token = len(ids)
        return self.token

    def step(self) -> int:
        if self.fail == "step":
            raise RuntimeError("no second token")
        self.token += 1
        return self.token

    def close(self) -> None:
        self.open = False


class CountingPeer(Peer):
    title, package = "counting", "pytest"
    fail = ""

    @property
    def short_precision(self) -> str:
        return "f32"

    def open(self, threads: int) -> Session:
        if self.fail == "open":
            raise ImportError("libcounting.so: cannot open shared object file")
        self.opened: list[tuple[int, Counting]] = [
            *getattr(self, "opened", []),
            (threads, Counting(self.fail)),
        ]
        return self.opened[-1][1]


def test_a_session_is_shared_by_cases_with_the_same_threads(setup: PeerSetup) -> None:
    peer = CountingPeer(setup)
    case = peer.decode_case(5, 1)
    case.start()
    case.step()
    case.step()
    assert peer.chosen == [5, 6, 7]
    peer.prompt_case(9, 1).step()
    assert peer.chosen == [9]
    assert [threads for threads, _ in peer.opened] == [1]
    peer.decode_case(5, 2)
    assert [(threads, session.open) for threads, session in peer.opened] == [(1, False), (2, True)]
    peer.close()
    assert not peer.opened[1][1].open
    assert peer.name == "counting f32"
    assert peer.version == pytest.__version__


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        ("open", "ImportError: libcounting.so: cannot open shared object file"),
        ("start", "RuntimeError: no kernel for this"),
        ("step", "RuntimeError: no second token"),
    ],
)
def test_a_peer_that_fails_is_a_row_and_the_others_go_on(
    setup: PeerSetup, monkeypatch: pytest.MonkeyPatch, fail: str, reason: str
) -> None:
    good, bad = CountingPeer(setup), CountingPeer(setup)
    bad.fail = fail
    cases, failed = decode_cases([bad, good], 4, 2)
    assert [case.name for case in cases] == ["counting f32"]
    assert failed == [MissingPeer("counting f32", reason, 2)]
    cases, failed = prompt_cases([bad, good], 4, 2)
    assert len(cases) == (2 if fail == "step" else 1)
    json.dumps([row.to_dict() for row in failed])


@pytest.mark.parametrize("name", MODULES)
def test_a_peer_that_is_not_installed_says_how_to_get_it(
    name: str, setup: PeerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, extra = MODULES[name]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == module else found(n))
    peers, missing = available([name], replace(setup, dtype=torch.bfloat16))
    reason = f'not installed: pip install "flexidepth[{extra}]" adds it'
    assert (peers, missing) == ([], [MissingPeer(name, reason)])


def test_the_extras_that_are_named_exist() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML by itself")
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for peer in PEERS.values():
        if isinstance(peer, type) and issubclass(peer, FilePeer):
            assert any(line.startswith(peer.package) for line in extras[peer.extra]), peer


def test_names() -> None:
    both = peer_names(torch.bfloat16)
    assert both == list(PEERS)
    assert peer_names(torch.float32) == [n for n in both if not n.endswith("-float32")]


@pytest.mark.parametrize("name", ["transformers-eager-float32", "openvino-float32"])
def test_a_peer_that_would_be_another_one_is_not_timed_twice(name: str, setup: PeerSetup) -> None:
    _, (missing,) = available([name], setup)
    assert missing.reason.startswith("the run is in float32: ")


def test_without_a_compiler_nothing_is_compiled(
    setup: PeerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    _, (missing,) = available(["transformers-compile"], setup)
    assert "no-such-compiler not found; install one or set CXX" in missing.reason


def test_what_a_constructor_raises_is_a_reason(
    setup: PeerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: PeerSetup) -> Peer:
        raise OSError("libtbb.so.12 is missing")

    monkeypatch.setitem(PEERS, "broken", broken)
    said: list[str] = []
    _, (missing,) = available(["broken"], setup, said.append)
    assert missing == MissingPeer("broken", "OSError: libtbb.so.12 is missing")
    assert said == ["preparing broken"]


def test_the_windows_of_mistral_are_not_left_out_in_silence(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    setup = setup_of(tmp_path, "mistral", sliding_window=16)
    _, (missing,) = available(["llama.cpp"], setup)
    assert "a sliding window of 16 tokens, shorter than the 64 of this run" in missing.reason


def test_ctranslate2_does_not_time_another_rotary_embedding(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    _, (missing,) = available(["ctranslate2"], setup_of(tmp_path, rope_parameters=LLAMA3))
    assert missing.reason.endswith("it would compute something else")


def test_llama_cpp_for_the_cpu_is_not_timed_as_one_for_cuda(setup: PeerSetup) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this one is built with CUDA")
    _, (missing,) = available(["llama.cpp"], replace(setup, device="cuda"))
    assert "is built for the CPU" in missing.reason
    assert missing.reason.endswith("builds it with CUDA")


def test_the_export_is_the_base_model_in_the_type_of_the_run(setup: PeerSetup) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    narrow = replace(setup, dtype=torch.bfloat16)
    folder = exported(narrow)
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = dict(base_model_of(setup.checkpoint.config, setup.checkpoint.tensors()).state_dict())
    got = model.state_dict()
    assert model.dtype == torch.bfloat16
    assert set(got) == set(wanted)
    assert all(torch.equal(got[name], wanted[name].to(torch.bfloat16)) for name in wanted)
    assert len(AutoTokenizer.from_pretrained(folder)) == setup.checkpoint.config.vocab_size
    assert folder.parent == model_folder(narrow)
    assert folder.parent != model_folder(setup)


def test_another_model_gets_another_folder(setup: PeerSetup, tmp_path: Path) -> None:
    other = setup_of(tmp_path, rms_norm_eps=2e-6)
    assert model_folder(other).name != model_folder(setup).name
    again = setup_of(tmp_path / "again")
    assert model_folder(again).name == model_folder(setup).name


def test_what_is_made_is_made_once_and_never_by_half(tmp_path: Path) -> None:
    target = tmp_path / "a" / "model"

    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise PeerUnavailable("no space")

    with pytest.raises(PeerUnavailable):
        made_once(target, fail)
    assert list(target.parent.iterdir()) == []
    made_once(target, lambda path: path.mkdir())
    assert made_once(target, fail) == target
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", r"it broke \(killed by SIGABRT\)$"),
        (
            "import sys; print('\\n'.join(map(str, range(40)))); sys.exit('no such op')",
            r"it broke \(exit code 1\): 36; 37; 38; 39; no such op$",
        ),
    ],
)
def test_a_process_that_fails_says_how(
    code: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PeerUnavailable, match=reason):
        run_apart(["-c", code], "it broke")
    assert capfd.readouterr() == ("", "")


class Crashing(Session):
    """Dies as native code does."""

    def __init__(self, path: str, threads: int) -> None:
        import os

        assert Path(path).read_text() == "converted"
        if threads == 1:
            os.abort()

    def start(self, ids: Any) -> int:
        return 0

    def step(self) -> int:
        return 0


class CrashingPeer(FilePeer):
    title, package, module, extra, session = "crashing", "pytest", "pytest", "test", Crashing
    short_precision = "f32"
    file_name = "crashing"

    def convert(self, target: Path) -> None:
        target.write_text("converted")

    def arguments(self, threads: int) -> dict[str, Any]:
        return {"threads": threads}


def test_a_crash_with_some_number_of_threads_is_a_row_and_not_the_end(setup: PeerSetup) -> None:
    peer = CrashingPeer(setup)
    cases, (failed,) = decode_cases([peer], 4, 1)
    assert not cases
    assert failed.reason.startswith("its trial with threads = 1 failed (killed by SIGABRT)")
    cases, failed_now = decode_cases([peer], 4, 2)
    assert (len(cases), failed_now) == (1, [])


def test_reasons_are_one_line_of_bounded_length() -> None:
    assert shorten("a\n  b") == "a b"
    long = shorten("begin " + "x" * 5000 + " end")
    assert len(long) < 420
    assert long.startswith("begin ")
    assert long.endswith(" end")
    assert str(PeerUnavailable("a\nb")) == "a b"


def test_requirements_that_are_there_are_not_reported() -> None:
    require("json", "peers")
