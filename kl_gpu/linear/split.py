"""Picked columns and their complement, as `kl_gpu.complement` has them, from hidden states and an LM head.

Two operators, a single node each under torch.compile. Forward makes the logits of some rows and takes from
them what a row comes to; backward makes them again, writes their gradient over them, and carries it on by two
products. So a call costs four products, and what it holds does not grow with N.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..arguments.params import LinearSplitParams
from ..arguments.reduction import compute_dtype, wide_dtype
from ..backends.interface import COMPLEMENT_STATS
from ..ops import complement as ops
from ..ops.register import operator
from ..ops.views import two_at_least
from .accumulate import HeadGradients, gradient_outputs
from .chunks import Chunk, chunks_of, memory_of_rows
from .heads import Cap, Head, blocks_of, capped_at_once
from .op import settled

_ROWS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor? rows"
_PARAMS = (
    "ScalarType dtype, float inner, float cap, SymInt vocab_size, SymInt chunk_rows, float scale, "
    "bool sweeps, bool entropy, bool validate, str argument, str backend, Tensor? scales=None"
)


class _Part(NamedTuple):
    """Some rows of a chunk.

    Attributes:
        rows: their place in the chunk.
        logits: as the cap leaves them, two columns at least.
        ids, keep: their columns, and which of them count.
        scales: 1/temperature of each `[n, 1]`, where they have their own.
    """

    rows: slice
    logits: Tensor
    ids: Tensor
    keep: Tensor | None
    scales: Tensor | None


class _Chunks:
    """The chunks of a call, one after the other in the same memory, with their logits."""

    def __init__(
        self, side: Any, ids: Tensor, valid: Tensor | None, scales: Tensor | None, params: LinearSplitParams
    ) -> None:
        device, self.ids, self.scales, head = side[0].device, ids, scales, params.head
        self.all = list(chunks_of(valid, len(ids), params.row_bytes, params.chunk_rows, device))
        self.head = Head(side, head.dtype, params.vocab_size, self.all)
        logits = self.head.buffer
        self.at_once = capped_at_once(logits) if head.cap else max(1, len(logits))
        self.cap = Cap(head, logits, compute_dtype(head.dtype, head.dtype), min(len(logits), self.at_once))

    def parts(self, chunk: Chunk, logits: Tensor) -> Iterator[_Part]:
        ids, scales = chunk.take(self.ids), None if self.scales is None else chunk.take(self.scales)
        for rows in blocks_of(len(logits), self.at_once):
            keep, own = (None if x is None else x[rows] for x in (chunk.keep, scales))
            yield _Part(rows, two_at_least(self.cap.of(logits[rows])), ids[rows], keep, own)


def _split_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *_: object) -> Any:
    shapes = ids.shape, ids.shape[:1], ids.shape[:1], (len(ids), COMPLEMENT_STATS)
    return tuple(hidden.new_empty(shape, dtype=wide_dtype(hidden.device)) for shape in shapes)


@operator(f"linear_remainder({_ROWS}, {_PARAMS}) -> (Tensor, Tensor, Tensor, Tensor)", _split_fake)
def _split(*arguments: Any) -> tuple[Tensor, ...]:
    """The picked scaled logits `[N, K]`, the complement's log-sum-exp and entropy `[N]`, row statistics."""
    *side, ids, valid = arguments[:5]
    params, scales = LinearSplitParams.from_arguments(*arguments[5:])
    hidden, wide = side[0], wide_dtype(side[0].device)
    if params.validate:
        ops.check_ids(ids, valid, params.vocab_size, params.argument)
    with torch.no_grad(), settled(hidden.device):
        chunks = _Chunks(side, ids, valid, scales, params)
        shapes = ids.shape, ids.shape[:1], ids.shape[:1], (len(ids), COMPLEMENT_STATS)
        outputs = [memory_of_rows(chunks.all, hidden, shape, wide) for shape in shapes]
        for chunk in chunks.all:
            logits = chunks.head.logits(chunks.head.states(chunk))
            found = [_split_part(part, params) for part in chunks.parts(chunk, logits)]
            for output, parts in zip(outputs, zip(*found, strict=True), strict=True):
                chunk.put(output, parts[0] if len(parts) == 1 else torch.cat(parts))
        return tuple(outputs)


def _split_part(part: _Part, params: LinearSplitParams) -> tuple[Tensor, ...]:
    _, logits, ids, keep, scales = part
    picked = ops.picked_logits(logits, ids, keep, False, "") * (params.scale if scales is None else scales)
    if params.sweeps:
        return picked, *ops.complement(
            logits, ids, keep, params.scale, params.entropy, params.backend, scales
        )
    nothing = picked.new_zeros(len(ids))
    return picked, nothing, nothing, picked.new_zeros((len(ids), COMPLEMENT_STATS))


def _gradient_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = arguments[:3]
    return gradient_outputs(hidden, weight, bias, arguments[9])


@operator(
    f"linear_remainder_gradient({_ROWS}, Tensor stats, Tensor to_given, Tensor to_rest, Tensor? to_entropy, "
    f"bool[] needs, {_PARAMS}) -> (Tensor, Tensor, Tensor)",
    _gradient_fake,
)
def _gradient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What flows to hidden states, weight and bias, for those that `needs` asks for."""
    *side, ids, valid = arguments[:5]
    flows, needs = arguments[5:9], arguments[9]
    params, scales = LinearSplitParams.from_arguments(*arguments[10:])
    with torch.no_grad(), settled(side[0].device):
        chunks = _Chunks(side, ids, valid, scales, params)
        grads = HeadGradients(chunks.head, needs, chunks.all)
        for chunk in chunks.all:
            states = chunks.head.states(chunk)
            logits = chunks.head.logits(states)
            own = [None if x is None else chunk.take(x) for x in flows]
            for rows, x, some_ids, keep, own_scales in chunks.parts(chunk, logits):
                flow = (None if given is None else given[rows] for given in own)
                ops.complement_gradient(x, some_ids, keep, *flow, params.scale, params.backend, x, own_scales)
                z = logits[rows]
                if chunks.cap.cap:
                    chunks.cap.pull_back(x[:, : z.shape[1]], z)
                elif x.shape != z.shape:
                    z.copy_(x[:, : z.shape[1]])
            grads.add(chunk, logits, states)
        return grads.results()


def _to_head(params: LinearSplitParams, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    grad_picked, grad_rest, grad_entropy = incoming
    flows = *kept, grad_picked, grad_rest, grad_entropy if params.entropy else None
    asked = list(needs[:3])
    *rows, scales = tensors
    found = _gradient(*rows, *flows, asked, *params.as_arguments(), scales)
    return *(x if need else None for x, need in zip(found, asked, strict=True)), None, None, None


# Weights have no rows: the samples of a vmap run one after another.
_STEP = transforms.Step(
    lambda params, *tensors: _split(*tensors[:-1], *params.as_arguments(), tensors[-1]),
    _to_head,
    values=3,
    rowwise=False,
)


def split(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, valid: Tensor | None,
    scales: Tensor | None, params: LinearSplitParams,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`complement.split` of the logits that hidden states `[*, H]` make; ids `[*, K]`, scales `[*, 1]`."""
    lead = ids.shape[:-1]
    rows = hidden.reshape(-1, hidden.shape[-1]), weight, bias, ids.reshape(-1, ids.shape[-1])
    keep = None if valid is None else valid.reshape(-1)
    own = None if scales is None else scales.reshape(-1, 1)
    picked, rest_lse, rest_entropy = transforms.apply(_STEP, params, *rows, keep, own)
    return picked.view(ids.shape), rest_lse.view(lead), rest_entropy.view(lead)
