"""The files of a recording and how one is told from another's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ComparisonError
from ..files import replace

FORMAT = 1
MANIFEST, WINDOWS, HEAD, TOKENIZER = "manifest.json", "windows.safetensors", "head.safetensors", "tokenizer"
# The one key of a header's metadata: of several, safetensors writes the order that a hash happens to give.
_KEY = "kl_gpu"


def shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:06d}.safetensors"


def identity(manifest: dict[str, Any]) -> str:
    """What a recording's files say they belong to."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def write(path: Path, tensors: dict[str, Tensor], belongs_to: str) -> None:
    """A file of a recording, whole or not at all.

    Raises:
        ComparisonError: it cannot be written.
    """
    from safetensors.torch import save

    contents = {name: x.contiguous().cpu() for name, x in tensors.items()}
    about = json.dumps({"recording": belongs_to, "file": path.stem})
    try:
        replace(path, save(contents, {_KEY: about}))
    except OSError as error:
        raise ComparisonError(f"{path}: {error.strerror or error}") from None


def opened(path: Path, belongs_to: str, remedy: str = "") -> Any:
    """A file of a recording, memory-mapped.

    Args:
        remedy: what to do about one that is torn or another's, for the message.

    Raises:
        ComparisonError: it is missing, torn, or belongs to another recording or place.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
        about = json.loads((file.metadata() or {}).get(_KEY, "{}"))
    except FileNotFoundError:
        raise ComparisonError(f"{path}: no such file") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise ComparisonError(f"{path}: torn or not a shard ({error}){remedy}") from None
    if about != {"recording": belongs_to, "file": path.stem}:
        raise ComparisonError(f"{path}: belongs to another recording or another place in this one{remedy}")
    return file
