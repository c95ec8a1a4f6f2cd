"""A model's turn over a text, written a shard at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ... import __version__
from ...logprobs import token_logprobs
from ...topk.teacher import topk_logprobs
from ..errors import ComparisonError
from ..files import claim
from ..head import Head
from ..ranks import rank_and_world, wait
from ..run import Progress
from ..sides import DTYPES, Model
from ..windows import Windows
from . import layout

FORMS = ("hidden", "logits", "topk")
# What a shard is to hold, in bytes: little enough to lose to an interruption, enough to be read in one go.
_SHARD = 64 << 20


def record(
    model: Model, windows: Windows, out: Path, form: str = "hidden", *, k: int = 64, store: str | None = None,
    batch: int = 1, shard: int | None = None, fresh: bool = False, about: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Run a model over windows of a text and keep what it says of each token that follows.

    Called again after an interruption it goes on with the shards that are missing; the files are the same
    bit for bit. Under torchrun each rank takes its share of the shards, through a folder that all see.

    Args:
        model: what is recorded.
        windows: the tokens.
        out: the folder.
        form: "hidden" keeps the states that the LM head reads, and the head: exact. "logits" keeps them in
            16 bits, each row with its log-sum-exp before rounding. "topk" keeps the `k` likeliest tokens,
            what all others have together, and the probability of the token that came.
        k: of "topk".
        store: dtype of "logits", "float16", "bfloat16" or "float32"; None is the model's own where that has
            16 bits, which is exact, else "float16".
        batch: windows that go through the model together. A product's last bits may depend on it.
        shard: windows of a file, rounded up to batches; None is as many as make 64 MiB, and no more than an
            eighth of all.
        fresh: throw away what the folder holds of an earlier recording.
        about: what else the manifest is to say, such as a hash of the text; another value is another
            recording.
        progress: told of every batch.

    Returns:
        The folder, which :class:`kl_gpu.compare.Recording` reads.

    Raises:
        ComparisonError: an argument is wrong, or the folder holds something else or cannot be used; what it
            holds stays.
    """
    if form not in FORMS:
        raise ComparisonError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if batch < 1:
        raise ComparisonError(f"batch must be at least 1, got {batch}")
    if shard is not None and shard < 1:
        raise ComparisonError(f"shard must be at least 1, got {shard}")
    if form == "topk" and not 1 <= k <= model.vocab_size:
        raise ComparisonError(f"k must lie between 1 and {model.vocab_size}, got {k}")
    if windows.counts is not None:
        raise ComparisonError("windows of which some predictions do not count cannot be recorded")
    head, dtype = Head.of(model.model) if form == "hidden" else None, _stored_dtype(model, form, store)
    width = {"logits": model.vocab_size, "topk": 2 * k}.get(form) or int(cast(Head, head).weight.shape[1])
    wished = shard or min(-(-len(windows.ids) // 8), _SHARD // (windows.rows * width * dtype.itemsize) or 1)
    per_shard = batch * -(-wished // batch)
    manifest = {
        "format": layout.FORMAT, "form": form, "dtype": str(dtype).removeprefix("torch."),
        "k": k if form == "topk" else None, "windows": len(windows.ids), "ctx": windows.ids.shape[1],
        "first": windows.first, "tokens": windows.fingerprint, "categories": windows.categories,
        "windows_of_a_shard": per_shard, "batch": batch, "vocab_size": model.vocab_size,
        "softcap": head and head.softcap, "logit_scale": head and head.logit_scale,
        "leading_token": model.bos,
        "model": model.name, "model_bytes": model.nbytes, "weights": model.fingerprint,
        "tokenizer": model.tokenizer, "versions": _versions(), **(about or {}),
    }  # fmt: skip
    rank, world = rank_and_world()
    if rank == 0:
        _prepare(out, manifest, fresh, model, windows, head)
    wait()
    shards = torch.arange(len(windows.ids), device="cpu").split(per_shard)
    own = range(rank, len(shards), world)
    done, total = 0, sum(len(shards[i]) for i in own) * windows.rows
    for index in own:
        path, which = layout.shard(out, index), shards[index]
        if path.exists():
            layout.opened(path, layout.identity(manifest), "; remove it, and it is recorded again")
            done += len(which) * windows.rows
            continue
        parts: list[dict[str, Tensor]] = []
        for some in which.split(batch):
            parts.append(_kept(model, windows, some.tolist(), form, dtype, k, head if not parts else None))
            done += len(some) * windows.rows
            if progress is not None:
                progress(model.name, done, total)
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        layout.write(path, joined, layout.identity(manifest))
    wait()
    return out


def _stored_dtype(model: Model, form: str, store: str | None) -> torch.dtype:
    own: torch.dtype = model.model.dtype
    if form != "logits":
        if store is not None:
            raise ComparisonError(f"the dtype to store is a choice for logits only, not for {form}")
        return own if form == "hidden" else torch.float32
    if store is None:
        return own if own.itemsize == 2 else torch.float16
    if store not in DTYPES:
        raise ComparisonError(f"the dtype to store must be one of {', '.join(DTYPES)}, got {store!r}")
    return DTYPES[store]


def _versions() -> dict[str, str]:
    found = {"kl_gpu": __version__, "torch": torch.__version__}
    try:
        from transformers import __version__ as version
    except ImportError:
        return found
    return found | {"transformers": version}


def _prepare(
    out: Path, manifest: dict[str, Any], fresh: bool, model: Model, windows: Windows, head: Head | None
) -> None:
    """Everything but the shards. The manifest comes last: whoever finds it finds the rest."""
    belongs_to = layout.identity(manifest)
    path = out / layout.MANIFEST
    refusal = f"{out}: holds another recording; name another folder with --out, or pass --fresh"
    try:
        # A recording that came to nothing claims no folder.
        if path.exists() and (fresh or not any(out.glob("shard-*.safetensors"))):
            # The manifest first: a folder without one is nobody's, and its shards name their recording.
            path.unlink()
            for old in out.glob("shard-*.safetensors"):
                old.unlink()
            shutil.rmtree(out / layout.TOKENIZER, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            layout.write(out / layout.WINDOWS, {"ids": windows.ids}, belongs_to)
            if head is not None:
                tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
                layout.write(out / layout.HEAD, tensors, belongs_to)
            if model.encoder is not None:
                model.encoder.save_pretrained(out / layout.TOKENIZER)
        claim(path, manifest, refusal)
    except OSError as error:
        raise ComparisonError(f"{out}: {error.strerror or error}") from None


def _kept(
    model: Model, windows: Windows, which: list[int], form: str, dtype: torch.dtype, k: int, head: Head | None
) -> dict[str, Tensor]:
    """A batch's part of a shard; a head is checked against the model's own logits."""
    if form == "hidden":
        hidden, logits = model.states(windows, which)
        if head is not None:
            head.check(hidden[0], logits[0])
        return {"hidden": hidden.cpu()}
    logits = model.logits(windows, which)
    if form == "logits":
        return {"logits": logits.to(dtype).cpu(), "normalizer": logits.float().logsumexp(-1).cpu()}
    best = topk_logprobs(logits, k)
    labels = windows.labels[which].to(logits.device)
    return {
        "logprobs": best.logprobs.cpu(),
        "ids": best.ids.int().cpu(),
        "tail_logprob": best.tail_logprob.cpu(),
        "label_logprob": token_logprobs(logits, labels).cpu(),  # type: ignore[union-attr]
    }
