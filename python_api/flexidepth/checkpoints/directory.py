"""Hugging Face directories: weights in safetensors, single or sharded, and the tokenizer beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import FlexiDepthConfig
from ..errors import CheckpointError, UnsupportedError
from .checkpoint import NAMES_SHOWN, Rows, Shapes, check_names, expected_shapes
from .directory_config import read_json
from .names import from_released

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = ("F32", "BF16", "F16")
# Pages of a mapped file count as this process's memory until it is closed, so it is opened anew now and then.
_MAPPED_BYTES = 64 << 20


class SafetensorsWeights:
    """Tensors in safetensors files. Names, shapes and types are checked here, before any weight is read.

    Args:
        where: the directory, for messages.
        files: canonical name -> (file, stored name).
        wanted: canonical names and shapes.

    Raises:
        CheckpointError: tensors missing, left over, of other shapes or types than config.json says, or a
            damaged file.
    """

    def __init__(self, where: Path, files: dict[str, tuple[Path, str]], wanted: Shapes) -> None:
        self.files = files
        check_names(where, wanted, files)
        _check_tensors(files, wanted)

    def read(self, names: Iterable[str], rows: Rows | None = None) -> Iterator[Tensor]:
        """Memory-mapped tensors of these canonical names, as stored; of a name in `rows` these rows alone."""
        path, handle, mapped = None, None, 0
        for name in names:
            wanted, stored = self.files[name]
            if handle is None or path != wanted or mapped > _MAPPED_BYTES:
                del handle
                path, handle, mapped = wanted, _open(wanted), 0
            wanted_rows = (rows or {}).get(name)
            if wanted_rows is None:
                tensor = handle.get_tensor(stored)
            else:
                tensor = _rows_of(handle.get_slice(stored), wanted_rows)
            mapped += tensor.nbytes
            yield tensor
            del tensor


class DirectoryWeights(SafetensorsWeights):
    """The weights of a model's directory, in one file or several.

    Args:
        routed: whether routers and adapters are among them.

    Raises:
        CheckpointError: as above. UnsupportedError: weights in another format.
    """

    def __init__(self, directory: Path, config: FlexiDepthConfig, *, routed: bool) -> None:
        files = _tensor_files(directory)
        if config.tie_word_embeddings:
            files.pop("lm_head.weight", None)  # older files hold the tied matrix twice
        for name in [name for name in files if name.endswith(".rotary_emb.inv_freq")]:
            del files[name]  # a constant that older releases of transformers stored
        super().__init__(directory, files, expected_shapes(config, routing=routed))


def directory_tokenizer(directory: Path) -> Any | None:
    """The tokenizer of a directory, None where it has none.

    Raises:
        CheckpointError: its files are damaged.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (directory / "tokenizer.json").exists():
        # Not AutoTokenizer: that wants to know the model's class, and may build the tokenizer anew.
        kind = PreTrainedTokenizerFast
    elif any(
        (directory / name).exists()
        for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        kind = AutoTokenizer
    else:
        return None
    try:
        return kind.from_pretrained(directory)
    except Exception as error:  # tokenizers raises plain Exception for a malformed file
        raise CheckpointError(f"{directory}: the tokenizer cannot be read: {error}") from error


def _tensor_files(directory: Path) -> dict[str, tuple[Path, str]]:
    """Canonical name -> (file, stored name)."""
    index, single = directory / INDEX, directory / SINGLE
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise CheckpointError(f"{index}: no weight_map from tensor names to files")
        outside = [file for file in weight_map.values() if Path(file).name != file]
        if outside:
            raise CheckpointError(f"{index}: {outside[0]!r} is not a file of its own directory")
        return {from_released(name): (directory / file, name) for name, file in weight_map.items()}
    if single.exists():
        return {from_released(name): (single, name) for name in stored_names(single)}
    if list(directory.glob("*.bin")):
        raise UnsupportedError(
            f"{directory}: its weights are pickled "
            f"({', '.join(p.name for p in sorted(directory.glob('*.bin')))}), which could run foreign code "
            "and is not read; save them as safetensors first: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(f"{directory}: no weights: neither {SINGLE} nor {INDEX} is there")


def stored_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    return list(_open(path).keys())


def stored_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors."""
    return dict(_open(path).metadata() or {})


def _check_tensors(files: dict[str, tuple[Path, str]], wanted: Shapes) -> None:
    handles = {path: _open(path) for path in dict.fromkeys(path for path, _ in files.values())}
    stored = {path: set(handle.keys()) for path, handle in handles.items()}
    shapes, dtypes = [], []
    for name, shape in wanted.items():
        path, key = files[name]
        if key not in stored[path]:
            raise CheckpointError(
                f"{path}: {key} is missing, though the index lists it there; fetch it again"
            )
        piece = handles[path].get_slice(key)
        if tuple(piece.get_shape()) != shape:
            shapes.append(f"{key} is {list(piece.get_shape())} instead of {list(shape)}")
        elif piece.get_dtype() not in _DTYPES:
            dtypes.append(f"{key} is {piece.get_dtype()}")
    folder = next(iter(handles)).parent
    if shapes:
        raise CheckpointError(
            f"{folder}: {_several(shapes)}; config.json and the weights do not belong together"
        )
    if dtypes:
        raise CheckpointError(f"{folder}: {_several(dtypes)}; {', '.join(_DTYPES)} are read")


def _rows_of(piece: Any, rows: Sequence[int]) -> Tensor:
    return torch.cat([piece[row : row + 1] for row in rows])


def _several(wrong: list[str]) -> str:
    rest = len(wrong) - NAMES_SHOWN
    return "; ".join(wrong[:NAMES_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing, though the index lists it; fetch the checkpoint again"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); fetch it again") from error
