"""Every Python block of docs/integrations.md runs as printed, on tiny models, for three steps."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\{code-block\} python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
NEEDED = ("trl", "datasets", "transformers", "accelerate", "torchmetrics", "lightning")


def title(block: str) -> str:
    return re.findall(r"kl_gpu\.integrations(?:\.| import )(.*)", block)[0]


def test_blocks_are_found() -> None:
    assert len(BLOCKS) == PAGE.count("```{code-block} python") >= 9


@pytest.mark.parametrize("block", BLOCKS, ids=title)
def test_block_runs(block: str, tmp_path: Path, llama: Any, tokenizer: Any, sentences: list[str]) -> None:
    wanted = {
        name for name in NEEDED if re.search(rf"(?:from|import) {name}\b|integrations\.{name}\b", block)
    }
    wanted |= {"datasets"} if "trl" in wanted else set()
    if missing := [name for name in wanted if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} of the extra integrations is not installed")
    llama(0).save_pretrained(tmp_path / "student")
    ids = torch.randint(3, 300, (12, 9), generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {
        "student": type(llama(0)).from_pretrained(tmp_path / "student"),
        "teacher": llama(1),
        "tokenizer": tokenizer,
        "tokens": [{"input_ids": row, "labels": row} for row in ids],
        "output_dir": str(tmp_path),
        "on_a_cpu": {
            "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "logging_steps": 1,
        },
    }  # fmt: skip
    if "datasets" in wanted:
        names["prompts"] = __import__("datasets").Dataset.from_dict({"prompt": sentences})
    exec(compile(block, "docs/integrations.md", "exec"), names)
    state = getattr(names.get("trainer"), "state", None)
    if hasattr(state, "log_history"):
        assert state.global_step == 3
