"""Two processes over Gloo: heads sharded by FSDP 2, and a metric reduced over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import kl_gpu
from distributed_world import free_port, join

transformers = pytest.importorskip("transformers", reason="of the extra integrations")


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    small = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**small, num_attention_heads=2, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 300, (4, 10), generator=torch.Generator().manual_seed(1))
    return ids, torch.where(torch.arange(10) < torch.arange(4)[:, None], -100, ids)


def rank_of_two(rank: int, port: int, folder: Path, packages: list[str]) -> None:
    torch.cuda.is_available = lambda: False  # type: ignore[method-assign]  # Gloo, wherever this runs
    join(rank, 2, port)
    from torch.distributed.fsdp import fully_shard

    from kl_gpu.integrations import _trl_losses
    from kl_gpu.integrations.torchmetrics import TokenDivergence
    from kl_gpu.integrations.transformers import distillation_loss

    ids, labels = batch()
    mine, items = slice(2 * rank, 2 * rank + 2), (labels[:, 1:] != -100).sum() / 2
    found: dict[str, object] = {}
    for fused in (True, False):
        student = model(0)
        for layer in student.model.layers:
            fully_shard(layer)
        fully_shard(student)
        loss = distillation_loss(model(1), student=student, fused_linear=fused)
        value = loss(student(input_ids=ids[mine]), labels[mine], num_items_in_batch=items)
        value.backward()
        grads = [x.grad.full_tensor() for x in student.parameters()]
        dist.all_reduce(value := value.detach().clone())
        found[f"fused={fused}"] = value / 2, grads
    head, hidden = student.lm_head.weight, torch.ones(1, 2, 16)
    found["sharded"] = type(head).__name__
    _trl_losses._is_spread = lambda: False
    found["trl"] = _trl_losses.chunked_divergence_loss(
        hidden, hidden, head, model(1).lm_head.weight, torch.ones(1, 2), 0.5
    )[0].detach()
    if "torchmetrics" in packages:
        metric = TokenDivergence("js", shift=True)
        with torch.no_grad():
            logits = [model(seed)(input_ids=ids[mine]).logits for seed in (0, 1)]
        metric.update(*logits, labels=labels[mine])
        found["metric"] = metric.compute()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path) -> None:
    packages = []
    try:
        import torchmetrics  # noqa: F401

        packages.append("torchmetrics")
    except ImportError:
        pass
    mp.spawn(rank_of_two, (free_port(), tmp_path, packages), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    ids, labels = batch()
    whole, teacher = model(0), model(1)
    logits, target = whole(input_ids=ids).logits, teacher(input_ids=ids).logits.detach()
    loss = kl_gpu.kl_div(logits, target, labels=labels, shift=True)
    grads = torch.autograd.grad(loss, list(whole.parameters()), retain_graph=True)
    hidden = torch.ones(1, 2, 16)
    heads = whole.lm_head.weight, teacher.lm_head.weight
    trl = kl_gpu.js_div(*(hidden @ weight.detach().t() for weight in heads))
    js = kl_gpu.js_div(logits, target, labels=labels, shift=True)
    for found in ranks:
        assert found["sharded"] == "DTensor"
        assert found["trl"].item() == pytest.approx(trl.item(), rel=1e-5)
        for way in "fused=True", "fused=False":
            assert found[way][0].item() == pytest.approx(loss.item(), rel=1e-5)
            for mine, their in zip(found[way][1], grads, strict=True):
                torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5 * their.abs().max().item())
        if "metric" in found:
            assert found["metric"].item() == pytest.approx(js.item(), rel=1e-6)
