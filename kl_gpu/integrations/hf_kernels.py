"""The layout of a Hugging Face kernel repository, from the Triton backend, for `kernel-builder`.

    python -m kl_gpu.integrations.hf_kernels FOLDER --repo-id NAME/kl-gpu

It writes build.toml, CARD.md and torch-ext/kl_gpu, a copy of this package without the command line, the other
integrations and the compiled CPU kernels. Operators are registered under the namespace of the build, so that
several versions, and an installed kl_gpu, live in one process.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# What a kernel has no use for.
_LEFT_OUT = ("compare", "integrations", "__main__.py")
# What names this package or its operators, and what names those of a build (the builder adds `_ops.py`).
_REWRITTEN = (
    (r'Library\("kl_gpu",', 'Library(_ops.add_op_namespace_prefix("").rstrip(":"),'),
    (r'f?"kl_gpu::(\{\w+\}|\w+)"', r'_ops.add_op_namespace_prefix(f"\1")'),
    (r"torch\.ops\.kl_gpu\b", "_ops.ops"),
    (r'_is_installed\("kl_gpu\._native"\)', "False"),
    (r'import_module\(f"kl_gpu\.backends\.', 'import_module(f"{__package__}.'),
    (r'import_module\(f?"kl_gpu\.', 'import_module(f"{__package__}.'),
)
_BUILD = """[general]
name = "kl-gpu"
version = 1
edition = 5
license = "Apache-2.0"
backends = ["cuda", "rocm", "xpu"]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""
_CARD = """---
library_name: kernels
license: apache-2.0
---

# kl_gpu

Token-level KL, Jensen-Shannon, skew, Jeffreys and total-variation divergences straight from logits, with
gradients, in Triton: one read of each logit for the value, relative accuracy 5e-6 down to 1e-12.

```python
import torch
from kernels import get_kernel

kl_gpu = get_kernel("{repo_id}", version=1)
student = torch.randn(4, 128256, device="cuda", requires_grad=True)
teacher = torch.randn(4, 128256, device="cuda")
kl_gpu.kl_div(student, teacher).backward()
```

Functions: {names}.
"""


def write(folder: Path, repo_id: str) -> None:
    """Write the repository's files into `folder`, which is made where it is missing.

    Raises:
        RuntimeError: this package no longer holds what has to be rewritten; it is named.
    """
    from .. import __all__ as names

    target, found = folder / "torch-ext" / "kl_gpu", [0] * len(_REWRITTEN)
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if inside.parts[0] in _LEFT_OUT:
            continue
        text = path.read_text(encoding="utf-8")
        for number, (pattern, new) in enumerate(_REWRITTEN):
            text, count = re.subn(pattern, new, text)
            found[number] += count
        if "_ops." in text:
            line = f"\nfrom {'.' * len(inside.parts)} import _ops\n"
            first = "from __future__ import annotations\n"
            text = text.replace(first, first + line, 1)
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        (target / inside).write_text(text, encoding="utf-8")
    if missed := [pattern for (pattern, _), count in zip(_REWRITTEN, found, strict=True) if not count]:
        raise RuntimeError(f"kl_gpu has nothing like {', '.join(missed)} to put under a build's namespace")
    (folder / "build.toml").write_text(_BUILD.format(repo_id=repo_id), encoding="utf-8")
    listed = ", ".join(f"`{name}`" for name in names)
    (folder / "CARD.md").write_text(_CARD.format(repo_id=repo_id, names=listed), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kl_gpu.integrations.hf_kernels", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repo-id", default="YOUR-NAME/kl-gpu", help="where it will be published")
    given = parser.parse_args(arguments)
    write(given.folder, given.repo_id)


if __name__ == "__main__":
    main()
