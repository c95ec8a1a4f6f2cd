"""Where a trainer is not installed every module imports, and what needs the trainer names the extra."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import importlib.abc, json, pkgutil, sys
OURS = {"kl_gpu", "torch", "triton", "numpy"}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
PACKAGES = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Block())
import kl_gpu
import kl_gpu.integrations as room
names = [found.name for found in pkgutil.iter_modules(room.__path__)]
modules = {name: importlib.import_module(f"kl_gpu.integrations.{name}") for name in names}
said = {}
for name, attribute in json.loads(sys.argv[2]):
    try:
        getattr(modules[name], attribute)()
    except ImportError as error:
        said[f"{name}.{attribute}"] = str(error)
print(json.dumps([names, said]))
"""

PACKAGES = [
    "transformers",
    "trl",
    "peft",
    "lightning",
    "torchmetrics",
    "liger_kernel",
    "datasets",
    "accelerate",
]
PACKAGES += ["verl", "swift", "openrlhf", "axolotl", "torchtune"]
USES = [
    ["trl", "patch"],
    ["trl_grpo", "GRPOTrainer"],
    ["transformers", "DistillationTrainer"],
    ["torchmetrics", "TokenDivergence"],
    ["lightning", "TokenStatsCallback"],
    ["verl", "patch"],
    ["swift", "patch"],
    ["openrlhf", "patch"],
    ["axolotl", "KLGpuPlugin"],
]


def test_without_any_trainer() -> None:
    arguments = json.dumps(PACKAGES), json.dumps(USES)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    names, said = json.loads(done.stdout)
    assert {"trl", "trl_grpo", "liger"} <= set(names)
    assert len(said) == len(USES)
    assert all("pip install kl_gpu[integrations]" in message for message in said.values())


def test_the_package_imports_no_trainer() -> None:
    code = f"import sys, kl_gpu.integrations; print(*sorted(set({PACKAGES}) & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "\n"
    )
