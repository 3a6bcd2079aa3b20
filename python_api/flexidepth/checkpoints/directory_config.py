"""FlexiDepthConfig out of a directory's config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import BASE_MODEL_TYPES, FlexiDepthConfig
from ..errors import CheckpointError, UnsupportedError
from .names import routing_from_released
from .routing_arguments import override_stored

TRAINED_KEY = "routers_trained"  # in config.json; only written when false
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is missing or malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a model directory has a {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; a JSON object is wanted")
    return content


def directory_config(
    directory: Path, routing: dict[str, Any], content: dict[str, Any] | None = None
) -> tuple[FlexiDepthConfig, bool, bool]:
    """(configuration, whether routers and adapters are stored, whether they were trained).

    Args:
        routing: routing arguments of FlexiDepthConfig. Where routers are stored, only those that do not
            change their shapes may differ from what is stored.
        content: what stands in for that of config.json.

    Raises:
        CheckpointError: keys missing or malformed. UnsupportedError: another architecture or variant.
    """
    path = directory / "config.json"
    content = read_json(path) if content is None else dict(content)
    kind = content.get("model_type")
    if "quantization_config" in content:
        method = content["quantization_config"].get("quant_method")
        raise UnsupportedError(
            f"{path}: weights quantised with {method!r} are not implemented; use the original ones"
        )
    # save_pretrained leaves out what equals a class's defaults; only this package's class is known to be read
    # with the same ones.
    missing = [key for key in _REQUIRED if key not in content and kind != "flexidepth"]
    if kind is None or missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing or ['model_type'])}")
    _merge_generation(directory, content)
    trained = bool(content.pop(TRAINED_KEY, True))
    if kind == "flexidepth":
        stored = _parse(path, content)
        return (
            override_stored(path, stored, routing),
            True,
            trained and stored.num_routed_layers > 0,
        )
    if kind == "ddllama":
        stored = _parse(
            path, {**content, "model_type": "llama"}, routing_from_released(path, content)
        )
        return override_stored(path, stored, routing), True, trained
    # The base model first and alone, so that an error about the file is not taken for one about `routing`.
    _parse(path, content)
    return FlexiDepthConfig.from_base(_base(path, content), **routing), False, False


def _parse(
    path: Path, content: dict[str, Any], routing: dict[str, Any] | None = None
) -> FlexiDepthConfig:
    """Configuration of a file's content, with the file named in every error."""
    try:
        if content["model_type"] == "flexidepth":
            stored: FlexiDepthConfig = FlexiDepthConfig.from_dict(content)
            return stored
        return FlexiDepthConfig.from_base(_base(path, content), **(routing or {}))
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    except (
        Exception
    ) as error:  # transformers and huggingface_hub check types with classes of their own
        raise CheckpointError(f"{path}: {error}") from error


def _base(path: Path, content: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    kind = content["model_type"]
    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
    if kind not in classes:
        raise UnsupportedError(
            f"model_type is {kind!r}; {', '.join(BASE_MODEL_TYPES)}, flexidepth and ddllama are "
            "implemented. A layer must be RMSNorm, rotary attention and SwiGLU, as theirs"
        )
    return classes[kind].from_dict(content)


def _merge_generation(directory: Path, content: dict[str, Any]) -> None:
    """Take the special tokens of generation_config.json, which transformers' generate prefers too."""
    path = directory / "generation_config.json"
    if path.exists():
        extra = read_json(path)
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        content.update({key: extra[key] for key in keys if extra.get(key) is not None})
