"""GRPO with the exact KL to its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kl_gpu.integrations.trl_grpo import GRPOTrainer

trl = pytest.importorskip("trl", reason="of the extra integrations")
datasets = pytest.importorskip("datasets", reason="of the extra integrations")
transformers = pytest.importorskip("transformers", reason="of the extra integrations")


def made(kind: Any, folder: Any, llama: Any, tokenizer: Any, sentences: list[str], **more: Any) -> Any:
    llama(0).save_pretrained(folder / "model")
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 4, "num_generations": 2, "learning_rate": 1e-2,
        "max_completion_length": 8, "beta": 0.3, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "bf16": False, "temperature": 0.8,
    }  # fmt: skip
    peft = {"peft_config": more.pop("peft_config")} if "peft_config" in more else {}
    return kind(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=trl.GRPOConfig(output_dir=str(folder), **settings | more),
        train_dataset=datasets.Dataset.from_dict({"prompt": sentences}), processing_class=tokenizer, **peft,
    )  # fmt: skip


def curves(trainer: Any) -> torch.Tensor:
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor([[entry[name] for name in ("loss", "grad_norm", "kl")] for entry in steps])


class Sampled(GRPOTrainer):
    """Ours, with TRL's k3 in the place of the exact KL: everything around it must then be TRL's."""

    def _exact_kl(self, model, seen, args, kwargs, inputs):
        logps = self._get_per_token_logps_and_entropies(model, *args, **kwargs)[0]
        r = inputs["ref_per_token_logps"] - logps
        return (r.exp() - r - 1) * self._mask(inputs)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_tokens_are_summed_up_as_trl_does(loss_type, tmp_path, llama, tokenizer, sentences) -> None:
    more = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "use_bias_correction_kl": False}
    theirs, ours = (
        curves(made(kind, tmp_path, llama, tokenizer, sentences, **more))
        for kind in (trl.GRPOTrainer, Sampled)
    )
    assert theirs[1:, 2].min() > 1e-4  # the first step is the reference's
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", [False, True], ids=["reference model", "adapter"])
def test_the_kl_is_that_of_the_whole_vocabulary(adapter, tmp_path, llama, tokenizer, sentences) -> None:
    more: dict[str, Any] = {}
    if adapter:
        peft = pytest.importorskip("peft", reason="of the extra integrations")
        more["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Watched(GRPOTrainer):
        def _exact_kl(self, model, *args):
            *_, inputs = args
            found = super()._exact_kl(model, *args)
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            kept = inputs["completion_ids"].shape[1]

            def logits(which):
                return which(ids, attention_mask=attention).logits[:, -kept - 1 : -1] / self.temperature

            q = logits(model).log_softmax(-1)
            with torch.no_grad():
                if adapter:
                    with model.disable_adapter():
                        p = logits(model).log_softmax(-1)
                else:
                    p = logits(self.ref_model).log_softmax(-1)
            by_hand = (q.exp() * (q - p)).sum(-1) * inputs["completion_mask"]
            weights = [x for x in model.parameters() if x.requires_grad]
            grads = [torch.autograd.grad(kl.sum(), weights, retain_graph=True) for kl in (found, by_hand)]
            slopes = torch.stack([torch.cat([x.flatten() for x in each]) for each in grads])
            seen.append((found.detach(), by_hand.detach(), slopes))
            return found

    trainer = made(Watched, tmp_path, llama, tokenizer, sentences, **more)
    trainer.train()
    for found, by_hand, slopes in seen[1:]:
        assert by_hand.max() > 1e-3
        torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-4 * slopes.abs().max().item())
    assert seen[0][0].max() < 1e-12
