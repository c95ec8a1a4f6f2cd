"""Distillation in transformers' Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kl_gpu.integrations._models import head_of
from kl_gpu.integrations.transformers import DistillationTrainer, distillation_loss

transformers = pytest.importorskip("transformers", reason="of the extra integrations")
pytest.importorskip("accelerate", reason="of the extra integrations")


class Texts(torch.utils.data.Dataset):
    """Sixteen rows of 10 tokens, of which a prompt of varying length does not count."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 300, (16, 10), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.ids[i].clone()
        labels[: i % 7] = -100
        return {
            "input_ids": self.ids[i],
            "attention_mask": torch.ones(10, dtype=torch.int64),
            "labels": labels,
        }


def arguments(folder: Any, **more: Any) -> Any:
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **settings | more)


def by_hand(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Σ KL(p‖q) over the tokens that count, in float64."""
    q, p = ((x[:, :-1].double() / temperature).log_softmax(-1) for x in (student, teacher))
    return ((p.exp() * (p - q)).sum(-1) * (labels[:, 1:] != -100)).sum()


class ByHand(transformers.Trainer):
    """Plain PyTorch's loss, as a Trainer's user writes it."""

    teacher: Any = None
    temperature = 2.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits
        total = by_hand(outputs.logits, teacher, labels, self.temperature)
        loss = total.float() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def losses(trainer: Any) -> Tensor:
    trainer.train()
    return torch.tensor([[x["loss"], x["grad_norm"]] for x in trainer.state.log_history if "loss" in x])


def run(
    kind: Any, folder: Any, student: Any, teacher: Any, training: dict[str, Any], **how: Any
) -> tuple[Tensor, float]:  # fmt: skip
    """Losses and norms of the gradient, and the loss of an evaluation."""
    args = arguments(folder, **{"per_device_eval_batch_size": 4} | training)
    ours = {} if kind is ByHand else {"teacher": teacher, "distillation": how}
    trainer = kind(model=student, args=args, train_dataset=Texts(), eval_dataset=Texts(), **ours)
    if kind is ByHand:
        trainer.teacher = teacher.eval()
    return losses(trainer), trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
    ],
    ids=["plain", "accumulated", "checkpointed"],
)
def test_curves_are_plain_pytorchs(training, fused, tmp_path, llama) -> None:
    theirs, their_eval = run(ByHand, tmp_path, llama(0), llama(1, hidden_size=24), training)
    ours, our_eval = run(
        DistillationTrainer, tmp_path, llama(0), llama(1, hidden_size=24), training, fused_linear=fused,
        temperature=2.0,
    )  # fmt: skip
    assert theirs[:, 1].min() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    assert our_eval == pytest.approx(their_eval, rel=2e-5)


def test_bf16_autocast(tmp_path, llama) -> None:
    """Fused or not, within bfloat16's rounding of the curve in float32; teacher and head run in bfloat16."""
    exact, _ = run(DistillationTrainer, tmp_path, llama(0), llama(1), {})
    for fused in (False, True):
        teacher = llama(1)
        seen = []
        teacher.lm_head.register_forward_hook(lambda module, args, found: seen.append(found.dtype))  # noqa: B023
        narrow, _ = run(DistillationTrainer, tmp_path, llama(0), teacher, {"bf16": True}, fused_linear=fused)
        assert set(seen) == {torch.bfloat16}
        torch.testing.assert_close(narrow, exact, rtol=0.05, atol=0.01)
        assert not torch.equal(narrow, exact)


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_a_trainer_at_hand(fused, tmp_path, llama) -> None:
    """compute_loss_func, with the labels' loss beside, and a teacher that was left training."""
    student, teacher = llama(0), llama(1).train()
    loss = distillation_loss(
        teacher, student=student, kind="js", beta=0.3, hard_weight=0.5, fused_linear=fused
    )
    trainer = transformers.Trainer(
        model=student, args=arguments(tmp_path, max_steps=1), train_dataset=Texts(), compute_loss_func=loss
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss.remove()
    with torch.no_grad():
        q, p = (m(batch["input_ids"]).logits[:, :-1].double().softmax(-1) for m in (student, teacher))
    loss = distillation_loss(
        teacher, student=student, kind="js", beta=0.3, hard_weight=0.5, fused_linear=fused
    )
    trainer.compute_loss_func = loss
    labels = batch["labels"][:, 1:]
    m = 0.3 * p + 0.7 * q
    js = (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum(-1)
    hard = -q.log().gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = ((js + 0.5 * hard) * (labels != -100)).sum() / 7
    found = trainer.compute_loss(student, dict(batch), num_items_in_batch=torch.tensor(7))
    assert not teacher.training
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert all(x.grad is None for x in teacher.parameters())
    assert student.lm_head.weight.grad.abs().max() > 0
    loss.remove()
    assert student(batch["input_ids"]).logits.shape[1] == 10


def test_shift_labels_are_taken_as_they_are(llama) -> None:
    student, teacher = llama(0), llama(1)
    loss, batch = distillation_loss(teacher, student=student), Texts()[3]
    ids, labels = batch["input_ids"][None], batch["labels"][None]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = loss(student(input_ids=ids), labels)
    outputs = student(input_ids=ids, shift_labels=shifted)
    assert loss(outputs, None).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="labels"):
        loss(student(input_ids=ids), None)
    with pytest.raises(ValueError, match="inputs_embeds"):
        loss(student(inputs_embeds=student.get_input_embeddings()(ids)), labels)


@pytest.mark.parametrize("where", ["lora", "trained copy"])
def test_the_adapter_of_the_head_is_used(where, tmp_path, llama) -> None:
    peft = pytest.importorskip("peft", reason="of the extra integrations")
    saved = {"modules_to_save": ["lm_head"]} if where == "trained copy" else {}
    targets = ["q_proj", "lm_head"] if where == "lora" else ["q_proj"]
    config = peft.LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **saved
    )
    curves = []
    for kind, how in (ByHand, {}), (DistillationTrainer, {"fused_linear": True, "temperature": 2.0}):
        base = llama(0)
        student = peft.get_peft_model(base, config)
        frozen = base.get_output_embeddings()
        before = getattr(frozen, "base_layer", getattr(frozen, "original_module", None)).weight.clone()
        curves.append(run(kind, tmp_path, student, llama(1), {}, **how)[0])
        after = getattr(frozen, "base_layer", getattr(frozen, "original_module", None)).weight
        assert torch.equal(before, after)
        head = head_of(student)
        assert not torch.equal(head.weight, after)
    torch.testing.assert_close(curves[1], curves[0], rtol=2e-5, atol=1e-6)


def test_what_cannot_be_seen_through_is_refused(llama) -> None:
    peft = pytest.importorskip("peft", reason="of the extra integrations")
    ids, labels = (x[None] for x in (Texts()[3]["input_ids"], Texts()[3]["labels"]))

    def called(student: Any) -> None:
        distillation_loss(llama(1), student=student, fused_linear=True)(student(input_ids=ids), labels)

    for more in {"use_dora": True}, {"lora_dropout": 0.1}:
        config = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM", **more)
        with pytest.raises(ValueError, match="adapter 'default' of the head"):
            called(peft.get_peft_model(llama(0), config).train())
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="virtual tokens"):
        called(peft.get_peft_model(llama(0), prompts))
    strange = llama(0)
    strange.lm_head = torch.nn.Sequential(strange.lm_head)
    with pytest.raises(ValueError, match="Sequential"):
        called(strange)
    scaled = llama(0)
    scaled.lm_head.register_forward_hook(lambda module, args, found: found * 3)
    with pytest.raises(ValueError, match="student's logits are not"):
        called(scaled)


@pytest.mark.parametrize("name", ["Gemma2", "Cohere", "Granite"])
def test_caps_and_scales_of_heads(name, llama) -> None:
    """Gemma's cap, Cohere's factor, Granite's divisor: from the configuration, held against the logits."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, **{"Granite": {"logits_scaling": 4.0}}.get(name, {}),
    )  # fmt: skip
    torch.manual_seed(0)
    student = getattr(transformers, f"{name}ForCausalLM")(config)
    ids, labels = (x[None] for x in (Texts()[3]["input_ids"], Texts()[3]["labels"]))
    found = []
    for fused in (False, True):
        loss = distillation_loss(llama(1), student=student, fused_linear=fused)
        found.append(loss(student(input_ids=ids), labels))
        loss.remove()
    assert found[0].item() > 1e-3
    assert found[1].item() == pytest.approx(found[0].item(), rel=1e-5)
