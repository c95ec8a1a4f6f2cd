"""KL, entropy and acceptance in Lightning's logs."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import torch

import kl_gpu
from kl_gpu.integrations.lightning import TokenStatsCallback, TokenStatsMixin

lightning = pytest.importorskip("lightning.pytorch", reason="of the extra integrations")
loggers = pytest.importorskip("lightning.pytorch.loggers")

VOCAB = 40


class Student(TokenStatsMixin, lightning.LightningModule):
    """An embedding that learns a fixed one's distribution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.other = torch.nn.Embedding(VOCAB, VOCAB), torch.nn.Embedding(VOCAB, VOCAB)
        self.expected: list[dict[str, float]] = []

    def _step(self, batch: Any) -> dict[str, torch.Tensor]:
        ids, labels = batch
        student, teacher = self.own(ids), self.other(ids).detach()
        self.expected.append(
            {
                name: x.item()
                for name, x in kl_gpu.token_stats(student, teacher, labels).mean()._asdict().items()
            }
            | {"count": (labels != -100).sum().item()}
        )
        loss = kl_gpu.kl_div(student, teacher, labels=labels)
        return {"loss": loss, "student_logits": student, "teacher_logits": teacher, "labels": labels}

    def training_step(self, batch: Any, index: int) -> Any:
        found = self._step(batch)
        self.log_token_stats(
            found["student_logits"], found["teacher_logits"], found["labels"], prefix="own/",
            names=("forward_kl", "acceptance"), log={"on_step": True},
        )  # fmt: skip
        return found

    def validation_step(self, batch: Any, index: int) -> Any:
        return self._step(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 5.0)


def test_steps_and_epochs_are_logged(tmp_path) -> None:
    ids = torch.randint(VOCAB, (12, 5))
    labels = torch.where(torch.arange(5) < torch.arange(12)[:, None] % 4, -100, ids)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, labels), batch_size=5)
    logger, module = loggers.CSVLogger(tmp_path), Student()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, callbacks=[TokenStatsCallback()], log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, batches, batches)
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv", encoding="utf-8") as file:
        table = [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]
    rows = [row for row in table if "train/forward_kl" in row]
    assert len(rows) == 3
    steps, validated = module.expected[:3], module.expected[3:]
    for row, expected in zip(rows, steps, strict=True):
        for name in ("forward_kl", "student_entropy", "acceptance", "top1_agree"):
            assert row[f"train/{name}"] == pytest.approx(expected[name], rel=1e-5)
        for name in ("forward_kl", "acceptance"):
            assert row[f"own/{name}"] == pytest.approx(expected[name], rel=1e-5)
    # an epoch's mean is over tokens, of which batches have unequal numbers
    tokens = sum(x["count"] for x in validated)
    mean = sum(x["forward_kl"] * x["count"] for x in validated) / tokens
    assert trainer.callback_metrics["val/forward_kl"].item() == pytest.approx(mean, rel=1e-5)
