"""TRL's trainers with kl_gpu's losses in place of their own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from kl_gpu.integrations import _trl_losses
from kl_gpu.integrations import trl as fast

transformers = pytest.importorskip("transformers", reason="of the extra integrations")
pytest.importorskip("trl", reason="of the extra integrations")
datasets = pytest.importorskip("datasets", reason="of the extra integrations")

CONFIG = {
    "max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none",
    "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "bf16": False,
}  # fmt: skip
# The trainer, where it is, its own settings, and which of our entries its loss runs through.
TRAINERS = {
    "Distillation": ("trl", {"max_completion_length": 8, "beta": 0.5, "temperature": 2.0}, "linear_div"),
    "GKD": ("trl.experimental.gkd", {"max_new_tokens": 8, "lmbda": 0.5, "beta": 0.25}, "js_div"),
    "GOLD": ("trl.experimental.gold", {"max_completion_length": 8, "lmbda": 0.0, "beta": 1.0}, "js_div"),
    "GRPO": ("trl", {"max_completion_length": 8, "beta": 0.1, "num_generations": 2}, "linear_token_logprobs"),
    "DPO": ("trl", {"max_length": 32}, "linear_token_logprobs"),
    "CPO": ("trl.experimental.cpo", {"max_length": 32}, "token_logprobs"),
    "TPO": ("trl.experimental.tpo", {"max_length": 32}, "token_logprobs"),
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our entries, as TRL's functions run them."""
    names: list[str] = []

    def counted(name: str, entry: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: names.append(name) or entry(*args, **kwargs)

    for name in ("js_div", "linear_div", "linear_token_logprobs", "token_logprobs"):
        monkeypatch.setattr(_trl_losses, name, counted(name, getattr(_trl_losses, name)))
    return names


def data(name: str, sentences: list[str]) -> Any:
    user = [[{"role": "user", "content": text}] for text in sentences]
    answers = [[{"role": "assistant", "content": text}] for text in sentences[1:] + sentences[:1]]
    if name in ("GKD", "GOLD"):
        return datasets.Dataset.from_dict({"messages": [u + a for u, a in zip(user, answers, strict=True)]})
    if name in ("DPO", "CPO"):
        return datasets.Dataset.from_dict({"prompt": user, "chosen": answers, "rejected": answers[::-1]})
    if name == "TPO":
        return datasets.Dataset.from_dict(
            {
                "prompt": user,
                "chosen": answers,
                "rejected": answers[::-1],
                "reference": answers[3:] + answers[:3],
            }
        )
    return datasets.Dataset.from_dict({"prompt": sentences})


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def trained(
    name: str, folder: Any, llama: Any, tokenizer: Any, sentences: list[str], **more: Any
) -> torch.Tensor:
    """Loss and norm of the gradient of each of 20 steps, `[2, 20]`."""
    module, settings, _ = TRAINERS[name]
    config, trainer = (getattr(import_module(module), name + which) for which in ("Config", "Trainer"))
    args = config(output_dir=str(folder), **CONFIG | settings | more)
    llama(0).save_pretrained(folder / "model")
    models = {"model": transformers.AutoModelForCausalLM.from_pretrained(folder / "model")}
    if name in ("Distillation", "GKD", "GOLD"):
        models["teacher_model"] = llama(1)
    if name in ("GRPO",):
        models["reward_funcs"] = reward
    run = trainer(args=args, train_dataset=data(name, sentences), processing_class=tokenizer, **models)
    run.train()
    steps = [entry for entry in run.state.log_history if "loss" in entry]
    return torch.tensor([[entry[name] for entry in steps] for name in ("loss", "grad_norm")])


@pytest.mark.parametrize("name", TRAINERS)
def test_curves_agree(name, tmp_path, llama, tokenizer, sentences, called) -> None:
    theirs = trained(name, tmp_path, llama, tokenizer, sentences)
    assert theirs.shape == (2, 20)
    assert not called
    with fast.patch():
        ours = trained(name, tmp_path, llama, tokenizer, sentences)
    assert TRAINERS[name][2] in called
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            mine, their, rtol=1e-5, atol=1e-5 * their.abs().max().clamp(min=0.1).item()
        )
    assert theirs[1].min() > 1e-2
