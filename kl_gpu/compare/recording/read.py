"""A recording, read by memory map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ComparisonError
from ..head import Head
from ..windows import Windows
from . import layout

_IGNORED = -100


class Recording(Dataset[dict[str, Tensor]]):
    """A folder that `kl-gpu record` wrote, a window at a time, for `torch.utils.data.DataLoader`.

    An item has `input_ids` int64 `[ctx]`, the tokens as the model read them; `labels` `[ctx]`, the same, −100
    where a token's prediction is not recorded; and what was recorded of the predictions at `positions`, the
    tensors that `kl_gpu.compare.recording` lists. A batch goes into a loss so:

        student = model(input_ids=batch["input_ids"]).logits[:, recording.positions]
        loss = kl_gpu.topk_div(student, **recording.teacher(batch))    # recorded as topk
        loss = kl_gpu.divergence(student, **recording.teacher(batch))  # recorded as logits
        loss = kl_gpu.linear_div(hidden[:, recording.positions], weight, **recording.teacher(batch))  # hidden

    Args:
        folder: where it is.
        incomplete: whether to take what there is of a recording that is not finished.

    Attributes:
        manifest: what `manifest.json` says.
        form: "hidden", "logits" or "topk".
        windows: the tokens, and which predictions are recorded; without those of missing shards.
        positions: the positions of a window whose predictions are recorded, a slice.

    Raises:
        ComparisonError: the folder holds no recording, or one that is unfinished, torn, or mixed with
            another's files; the message names the file. From an item too, where a shard cannot be read.
    """

    def __init__(self, folder: Path | str, *, incomplete: bool = False) -> None:
        self.folder = Path(folder)
        path = self.folder / layout.MANIFEST
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version, self.form = self.manifest["format"], str(self.manifest["form"])
            count, self._per_shard = self.manifest["windows"], int(self.manifest["windows_of_a_shard"])
        except OSError as error:
            raise ComparisonError(f"{path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError):
            raise ComparisonError(f"{path}: not the manifest of a recording") from None
        if version != layout.FORMAT:
            raise ComparisonError(f"{path}: format {version}, and this kl_gpu reads {layout.FORMAT}")
        self._identity = layout.identity(self.manifest)
        shards = range(-(-count // self._per_shard))
        missing = [i for i in shards if not layout.shard(self.folder, i).exists()]
        if missing and not incomplete:
            raise ComparisonError(
                f"{self.folder}: {len(missing)} of {len(shards)} shards are missing, the first is "
                f"{layout.shard(self.folder, missing[0]).name}; the same kl-gpu record goes on from here"
            )
        here = [i for i in shards if i not in set(missing)]
        for i in here:
            layout.opened(layout.shard(self.folder, i), self._identity)
        everything = torch.arange(count, device="cpu").split(self._per_shard)
        self._places = torch.cat([everything[i] for i in here] or [everything[0][:0]])
        ids = layout.opened(self.folder / layout.WINDOWS, self._identity).get_tensor("ids")[self._places]
        categories = self.manifest["categories"]
        named = None if categories is None else [categories[i] for i in self._places.tolist()]
        self.windows = Windows(ids, int(self.manifest["first"]), named)
        self.positions = slice(self.windows.first, ids.shape[1] - 1)
        self._head: Head | None = None
        # The shard that was read last: mapped pages of one, not of all, count as this process's.
        self._open: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps its own file.
        return self.__dict__ | {"_open": None}

    def __len__(self) -> int:
        return len(self.windows.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        ids = self.windows.ids[index].clone()
        labels = ids.clone()
        labels[: self.windows.first + 1] = _IGNORED
        if self.manifest["leading_token"] is not None:
            ids[0] = self.manifest["leading_token"]
        return {"input_ids": ids, "labels": labels} | self.recorded(index)

    def recorded(self, index: int) -> dict[str, Tensor]:
        """What is recorded of one window, `[rows, …]` each."""
        shard, row = divmod(int(self._places[index]), self._per_shard)
        path = layout.shard(self.folder, shard)
        if self._open is None or self._open[0] != shard:
            self._open = shard, layout.opened(path, self._identity)
        file = self._open[1]
        try:
            return {name: file.get_slice(name)[row] for name in sorted(file.keys())}
        except Exception as error:  # safetensors raises what its Rust side has for it
            raise ComparisonError(f"{path}: {error}") from None

    @property
    def head(self) -> Head:
        """The LM head, of a recording of hidden states."""
        if self._head is None:
            if self.form != "hidden":
                raise ComparisonError(f"{self.folder}: holds {self.form}, so there is no head")
            file = layout.opened(self.folder / layout.HEAD, self._identity)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            softcap, scale = self.manifest["softcap"], self.manifest["logit_scale"]
            self._head = Head(tensors["weight"], tensors.get("bias"), softcap, scale)
        return self._head

    def teacher(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of the loss that fits the form: `topk_div`, `linear_div` or `divergence`.

        Args:
            batch: items that a DataLoader put together, on any device.
        """
        if self.form == "topk":
            return {
                "teacher_logprobs": batch["logprobs"],
                "teacher_ids": batch["ids"],
                "teacher_tail_logprob": batch["tail_logprob"],
            }
        if self.form == "logits":
            return {"teacher_logits": batch["logits"]}
        if self.head.weight.device != batch["hidden"].device:
            self._head = self.head.to(batch["hidden"].device)
        weight, bias, softcap, scale = self.head
        return {
            "teacher_hidden": batch["hidden"],
            "teacher_weight": weight,
            "teacher_bias": bias,
            "teacher_softcap": softcap,
            "teacher_logit_scale": scale,
        }
