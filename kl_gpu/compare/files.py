"""Files that are written whole or not at all, and folders that know what they hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import ComparisonError


def replace(path: Path, content: bytes) -> None:
    """Write a file so that, wherever the process or the machine stops, the old one or the new one is there.

    Raises:
        OSError: it cannot be written; what was there before is left as it was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            # Lest after a power cut a file of the right name and size is full of zeros.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def claim(manifest: Path, about: dict[str, Any], refusal: str) -> None:
    """Write what a folder is to hold, or check that it holds just that.

    Raises:
        ComparisonError: it holds something else (`refusal` says so), or its manifest cannot be read.
        OSError: it cannot be written.
    """
    text = json.dumps(about, indent=1, sort_keys=True) + "\n"
    if not manifest.exists():
        replace(manifest, text.encode())
        return
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        raise ComparisonError(f"{manifest}: not a manifest of kl-gpu") from None
    if found != json.loads(text):
        raise ComparisonError(refusal)
