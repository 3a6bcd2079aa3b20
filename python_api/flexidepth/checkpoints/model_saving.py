"""save_pretrained of the transformers models, so that an old checkpoint survives whatever happens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import SaveError, UnsupportedError
from .partial import check_space, partial_directory, swap, swap_files, sync
from .shards import usual_mode

# Arguments of transformers' push_to_hub; the others are for writing.
_HUB = frozenset(
    (
        "repo_id",
        "commit_message",
        "commit_description",
        "private",
        "token",
        "revision",
        "create_pr",
        "tags",
    )
)


class SurvivingSave:
    """Goes before PreTrainedModel among a model's classes; its save_pretrained writes what that one's does."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *,
        push_to_hub: bool = False,
        variant: str | None = None,
        safe_serialization: bool = True,
        distributed_checkpoint: bool = False,
        **arguments: Any,
    ) -> None:
        """Save model and configuration in a directory, written in full before they replace older ones.

        Files there that belong to no model, a tokenizer's for instance, stay; older weights of the same
        variant go, also those that were cut into other shards.

        Args:
            save_directory: made where it does not exist.
            is_main_process: False = take part in gathering the weights, write nothing.
            push_to_hub: upload afterwards, as `push_to_hub(repo_id)` does; what was saved stays if that fails.
            arguments: the others of transformers' save_pretrained (max_shard_size, ...) and push_to_hub.

        Raises:
            SaveError: no permission, no space. What was there before is untouched and nothing is left behind.
            UnsupportedError: pickled or distributed checkpoints; an upload of something else than the model.
        """
        _check(push_to_hub, state_dict, variant, safe_serialization, distributed_checkpoint)
        target = Path(save_directory).expanduser().resolve()
        if target.exists() and not target.is_dir():
            raise SaveError(f"save: {target} is a file; give a directory")
        hub = {name: arguments.pop(name) for name in _HUB & arguments.keys()}
        # Parameters that are tied come once; what a state_dict shares is not known here.
        weights = self.parameters() if state_dict is None else ()  # type: ignore[attr-defined]
        needed = sum(tensor.nbytes for tensor in weights)
        exists = target.exists()
        with partial_directory(target, needed, inside=exists) as partial:
            if is_main_process:
                check_space(target, needed)
            super().save_pretrained(  # type: ignore[misc]
                partial,
                is_main_process=is_main_process,
                state_dict=state_dict,
                variant=variant,
                **arguments,
            )
            # Of several processes, all of which gather, one has written.
            if is_main_process and any(partial.iterdir()):
                for path in partial.glob("*.safetensors"):
                    path.chmod(usual_mode(partial))
                sync(partial)
                if exists:
                    swap_files(partial, target, _weights(partial, target, variant))
                else:
                    swap(partial, target)
        if push_to_hub and is_main_process:
            sizes = {k: arguments[k] for k in arguments.keys() & {"max_shard_size"}}
            self.push_to_hub(hub.pop("repo_id", target.name), **hub, **sizes)  # type: ignore[attr-defined]


def _check(
    push_to_hub: bool,
    state_dict: dict[str, Tensor] | None,
    variant: str | None,
    safe_serialization: bool,
    distributed_checkpoint: bool,
) -> None:
    if not safe_serialization:
        raise UnsupportedError(
            "save_pretrained: safe_serialization=False, pickled weights, which could run foreign code when "
            "read; only safetensors are written: leave it True"
        )
    if distributed_checkpoint:
        raise UnsupportedError(
            "save_pretrained: distributed_checkpoint=True, which every process writes a part of; one process "
            "writes the whole: leave it False"
        )
    if push_to_hub and (state_dict is not None or variant is not None):
        raise UnsupportedError(
            f"save_pretrained: push_to_hub together with {'variant' if state_dict is None else 'state_dict'}; the "
            "upload is of the model as it is: save first, then huggingface_hub.upload_folder the directory"
        )


def _weights(partial: Path, target: Path, variant: str | None) -> Iterator[str]:
    """Names of the model's weight files and index in `target`, if `partial` has such files, too."""
    dot = f".{re.escape(variant)}" if variant else ""
    kind = re.compile(
        rf"model{dot}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{dot}\.json"
    )
    if any(kind.fullmatch(path.name) for path in partial.iterdir()):
        yield from sorted(path.name for path in target.iterdir() if kind.fullmatch(path.name))
