"""What the examples share: text, language models, the loop that trains one, and what is shown of it."""

from __future__ import annotations

import ast
import contextlib
import gc
import itertools
import json
import math
import statistics
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from _report import BadInput, HeldOut, Run
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor

from kl_gpu import kl_div

IGNORED = -100  # the label of a position that counts in no loss, as in PyTorch, transformers and kl_gpu
# Beside the standard library, its folder may hold what was installed since and tests that not everyone has.
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
HELD_OUT_EVERY = 10
TOKENISER_CHARACTERS = 8_000_000  # enough text for 32 000 merges, and a second of training
START = "<|endoftext|>"  # between documents, so at the start of each
REPEATS = 7  # of what is timed
MEMORY_METHODS = {
    "cpu": "peak of the running sum of torch.profiler's allocation events",
    "cuda": "torch.cuda.max_memory_allocated, less what was allocated before",
}

Loss = Callable[[Tensor, Tensor], Tensor]  # of the student's logits or hidden states, and the teacher's
Objective = Callable[[Any, "Windows"], Tensor]  # of the model that trains, or its logits, and a batch

huggingface_hub.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Text(NamedTuple):
    """Documents, split by file so that no held-out line has a training line beside it."""

    source: str
    training: list[str]
    held_out: list[str]


def read(path: Path | None) -> Text:
    """The text under `path`, or the sources of Python's own standard library."""
    root = path or Path(sysconfig.get_path("stdlib"))
    suffixes, skipped = ((".py", ".md", ".txt"), set()) if path else ((".py",), NOT_THE_LIBRARY)
    if not root.exists():
        raise BadInput(f"--text: {root} does not exist")

    def is_wanted(file: Path) -> bool:
        kept = not any(name in skipped or name[0] == "." for name in file.relative_to(root).parts)
        return kept and file.suffix in suffixes and file.is_file()

    documents = []
    # By their POSIX names, because the order of a folder's entries differs between file systems.
    for file in [root] if root.is_file() else sorted(filter(is_wanted, root.rglob("*")), key=Path.as_posix):
        with contextlib.suppress(UnicodeDecodeError, OSError):
            documents.append(file.read_text("utf-8"))
    documents = [document for document in documents if document.strip()]
    source = str(path or "Python's standard library")
    if not documents:
        raise BadInput(f"--text: no UTF-8 text in {root} (of a folder, *.py, *.md and *.txt are read)")
    if len(documents) == 1:
        lines = documents[0].splitlines(keepends=True)
        cut = len(lines) - max(1, len(lines) // HELD_OUT_EVERY)
        return Text(source, ["".join(lines[:cut])], ["".join(lines[cut:])])
    every = min(HELD_OUT_EVERY, len(documents))
    held_out = documents[every - 1 :: every]
    del documents[every - 1 :: every]
    return Text(source, documents, held_out)


def trained_tokeniser(documents: Sequence[str], vocabulary: int = 32_000) -> Any:
    """Byte-level BPE, trained on a part of `documents` that is spread over all of them."""
    share = min(1.0, TOKENISER_CHARACTERS / max(1, sum(map(len, documents))))
    sample = (document[: int(len(document) * share) + 1] for document in documents)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sample, vocabulary, min_frequency=0, show_progress=False, special_tokens=[START])
    tokeniser = Tokenizer.from_str(bpe.to_str())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokeniser, bos_token=START, eos_token=START)


@dataclass(frozen=True)
class Windows:
    """Rows of consecutive tokens of one document, [count, sequence].

    A label is `IGNORED` where there is nothing to predict: at a document's start token and in the padding
    behind its end.
    """

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> Windows:
        return Windows(self.ids[rows], self.labels[rows])

    @property
    def predicted(self) -> int:
        """The tokens a model is asked for: none for a row's first, which has nothing before it."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def spread(self, count: int) -> Windows:
        """At most `count` windows, evenly spaced, so that all the documents have their say."""
        return self[torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()]

    def prompts(self, length: int) -> Tensor:
        """The rows' first tokens, where none of those is padding."""
        whole = (self.labels[:, 1:length] != IGNORED).all(1)
        if whole.sum() < 2:  # of one, there is no standard error
            raise BadInput(f"the text is too short for prompts of {length} tokens")
        return self.ids[whole, :length]

    def shuffled(self, size: int, steps: int, seed: int) -> Iterator[Windows]:
        """`steps` batches, a new shuffle each time round; the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            while len(order) < size:
                order = torch.cat([order, torch.randperm(len(self), generator=generator)])
            yield self[order[:size]]
            order = order[size:]


def windows(tokeniser: Any, documents: Sequence[str], sequence: int, device: str = "cpu") -> Windows:
    """Each document behind a start token (where the tokeniser has one), cut into rows of `sequence`."""
    start = tokeniser.bos_token_id if tokeniser.bos_token_id is not None else tokeniser.eos_token_id
    head = [] if start is None else [start]
    ids, labels = [], []
    for encoded in tokeniser(list(documents), add_special_tokens=False)["input_ids"]:
        tokens = torch.tensor(head + encoded, dtype=torch.long)
        targets = tokens.clone()
        targets[: len(head)] = IGNORED
        padding = (0, -len(tokens) % sequence)
        ids.append(F.pad(tokens, padding, value=start or 0).view(-1, sequence))
        labels.append(F.pad(targets, padding, value=IGNORED).view(-1, sequence))
    rows = Windows(torch.cat(ids).to(device), torch.cat(labels).to(device))
    # The first position of a row is predicted by none, so a row needs a label behind it to be of use.
    useful = (rows.labels[:, 1:] != IGNORED).any(1)
    if not useful.any():
        raise BadInput(f"the text is too short for windows of {sequence} tokens")
    return rows[useful]


class Size(NamedTuple):
    """Of a small Llama."""

    hidden: int
    layers: int


def small_llama(size: Size, vocabulary: int, positions: int, seed: int) -> Any:
    """With random weights. Its head is not tied to its embeddings: at this size that learns faster."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=size.hidden, intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 32, max_position_embeddings=positions, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def pretrained(option: str, name: str, sequence: int) -> tuple[Any, Any]:
    """The model and the tokeniser of a hub name or a folder, which `option` gave."""
    found: list[Any] = []
    for what, kind in (("a causal language model", "AutoModelForCausalLM"), ("a tokeniser", "AutoTokenizer")):
        try:
            found.append(getattr(transformers, kind).from_pretrained(name))
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise BadInput(f"{option}: cannot load {what} from {name!r}: {reason}") from error
    model, tokeniser = found
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < sequence:
        raise BadInput(f"--sequence: {name} has {positions} positions, got {sequence}")
    return model, tokeniser


def columns_of(model: Any) -> int:
    """V of the model's logits, which padding may make larger than its tokeniser."""
    return int(model.get_output_embeddings().weight.shape[0])


def teacher_and_student(settings: Any, sizes: tuple[Size, Size], text: Text) -> tuple[Any, Any, Any]:
    """The two models, small ones of these sizes where `settings` names none, and the tokeniser they share."""
    sequence, seed = settings.sequence, settings.seed
    if not settings.teacher:
        tokeniser = trained_tokeniser(text.training)
        models = [small_llama(size, len(tokeniser), sequence, seed + i) for i, size in enumerate(sizes)]
        return *models, tokeniser
    teacher, tokeniser = pretrained("--teacher", settings.teacher, sequence)
    if not settings.student:
        return teacher, small_llama(sizes[1], columns_of(teacher), sequence, seed), tokeniser
    student, other = pretrained("--student", settings.student, sequence)
    # A KL compares column with column, so a column must be the same token on both sides.
    theirs, sample = other.get_vocab(), text.training[0][:20_000]
    moved = [token for token, column in tokeniser.get_vocab().items() if theirs.get(token, column) != column]
    if moved:
        raise BadInput(f"the tokenisers of --teacher and --student differ: {moved[0]!r} has different ids")
    if tokeniser(sample)["input_ids"] != other(sample)["input_ids"]:
        raise BadInput("the tokenisers of --teacher and --student differ: they cut the same text differently")
    # In float32 whatever the file holds: an optimiser's small steps vanish in 16 bits.
    return teacher, student.float(), tokeniser


def autocast(batch: Windows) -> torch.autocast:
    return torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=batch.ids.is_cuda)


def logits_of(model: Any, batch: Windows) -> Tensor:
    # No attention mask: the padding stands behind the text, where a causal model does not look.
    with autocast(batch):
        return model(input_ids=batch.ids, use_cache=False).logits


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    # The labels are shifted and not the logits: a slice of those could not be flattened without a copy.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction=reduction)


def label_loss(model: Any, batch: Windows, vocab_size: int | None = None) -> Tensor:
    return cross_entropy(logits_of(model, batch)[..., :vocab_size], batch.labels)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of `tokens`, `[batch, time]`, under `logits`, `[batch, time, V]`."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


@torch.no_grad()
def complete(model: Any, prompts: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`prompts`, [batch, time], each with `count` tokens more, [batch, time + count].

    Drawn from the model's own distribution, at temperature 1 and with no token ruled out: the estimators of
    the KL are unbiased over just those. Every completion has the same length, because the model has seen no
    document end.
    """
    ids, new, cache = prompts, prompts, None
    for _ in range(count):
        output = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        new = drawn_tokens(output.logits[:, -1], generator)
        ids = torch.cat([ids, new], 1)
    return ids


def drawn_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each row, [batch, 1], by one uniform number; multinomial draws one for each column."""
    sums = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, torch.rand(len(logits), 1, generator=generator) * sums[:, -1:])


# A line that opens a block, or goes on with one, or decorates, parses only beside the lines it belongs to.
SURROUNDINGS = (
    "{}", "{}\n pass", "if 0: pass\n{}\n pass", "try: pass\n{}\n pass", "{}\n pass\nfinally: pass",
    "{}\ndef f(): pass",
)  # fmt: skip


def line_parses(line: str) -> bool:
    """Whether `line` is Python on its own, or would be with the block it opens or belongs to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parser's doubts, such as "\\d" in a string
        for surrounding in SURROUNDINGS:
            with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
                ast.parse(surrounding.format(line.strip()))
                return True
    return False


def share_that_parses(prompt: str, completion: str) -> float:
    """The share of the lines that `completion` brought to their end that parse, in [0, 1]; of none it is 0.

    Blank lines and comments count on neither side, since they are no achievement. The first line begins where
    the prompt left off. The last one was cut off by the limit on tokens, and is not judged.
    """
    first, *others = completion.split("\n")
    lines = [prompt.rpartition("\n")[2] + first, *others][:-1]
    judged = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return sum(map(line_parses, judged)) / len(judged) if judged else 0.0


def plain_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, vocab_size: int) -> Tensor:
    """The distillation loss as it is usually written in PyTorch."""
    log_q = F.log_softmax(student[:, :-1, :vocab_size] / temperature, -1, dtype=torch.float32)
    log_p = F.log_softmax(teacher[:, :-1, :vocab_size] / temperature, -1, dtype=torch.float32)
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    counts = labels[:, 1:] != IGNORED
    return (rows * counts).sum() / counts.sum().clamp_min(1) * temperature**2


class Head(NamedTuple):
    """What makes logits of hidden states: softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, model: Any) -> Head:
        head, config = model.get_output_embeddings(), model.config
        # As Gemma, Cohere and Granite name them.
        softcap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        return cls(head.weight, getattr(head, "bias", None), softcap, scale)

    def detach(self) -> Head:
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(weight=self.weight.detach(), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.scale * F.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def behind_heads(loss: Loss, student_head: Head, teacher_head: Head) -> Loss:
    """`loss`, which takes logits, of the hidden states that these heads make them of."""
    return lambda student, teacher: loss(student_head.logits(student), teacher_head.logits(teacher))


@torch.no_grad()
def measured(model: Any, held_out: Windows, batch: int, columns: int, kl: Objective | None = None) -> HeldOut:
    """`kl` sums the KL(teacher‖model) over a batch, given the model's logits of it."""
    model.eval()
    surprise = divergence = 0.0
    for start in range(0, len(held_out), batch):
        rows = held_out[start : start + batch]
        logits = logits_of(model, rows)
        surprise += cross_entropy(logits[..., :columns], rows.labels, "sum").item()
        divergence += kl(logits, rows).item() if kl else 0.0
    tokens = held_out.predicted
    return HeldOut(divergence / tokens if kl else None, math.exp(surprise / tokens))


def train(
    run: Run, model: Any, objective: Objective, training: Windows, settings: Any,
    measure: Callable[[Any], HeldOut], notify: Callable[[], None],
) -> None:  # fmt: skip
    """Trains `model` for `run.steps` steps, with the batch, peak learning rate and seed of `settings`."""

    def share_of_rate(step: int) -> float:
        """A linear start over a tenth of the steps, then a cosine down to a tenth."""
        warm_up = max(1.0, 0.1 * run.steps)
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        done = (step - warm_up) / max(1.0, run.steps - warm_up)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2

    # What a model draws while it trains (dropout, where it has some) is the same in every run.
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)
    batches = training.shuffled(settings.batch, run.steps, settings.seed)
    for _, batch in zip(run.each_step(partial(measure, model), notify), batches, strict=True):
        model.train()
        loss = objective(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.curve.append(loss.item())
        run.tokens += batch.ids.numel()


def device_type(name: str) -> str:
    """Of a device that can be used: "cpu" or "cuda"."""
    try:
        if (kind := torch.device(name).type) in MEMORY_METHODS:
            torch.zeros((), device=name)
            return kind
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
    raise BadInput(f"--device: expected cpu, cuda or cuda:N, got {name!r}")


def check(out: Path, backend: str | None, device: str = "cpu") -> None:
    """Finds out before the work, not behind it, what would end it, and has a GPU give the same bits again."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out: cannot write to {out}: {error.strerror}") from error
    if device != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # This would fill every new tensor, and so slow what is timed.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    probe = torch.zeros(1, 2, device=device)
    try:
        kl_div(probe, probe, backend=backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise BadInput(f"--backend: {error}") from error


def setup_of(text: Text, training: Windows, tokeniser: Any, settings: Any, **more: Any) -> dict[str, Any]:
    return {
        "text": text.source, "training_tokens": training.ids.numel(), "tokens_in_vocabulary": len(tokeniser),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "backend": settings.backend or "kl_gpu's choice", **more,
    }  # fmt: skip


def compared(takes: str, losses: dict[str, Loss], student: Tensor, teacher: Tensor) -> dict[str, Any]:
    """What each loss costs on the same logits, or hidden states: see `say_costs`."""

    def work(name: str) -> float:
        leaf = student.detach().requires_grad_()
        value = losses[name](leaf, teacher)
        value.backward()
        return value.item()  # waits for the device

    values = {name: work(name) for name in losses}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for name in [*losses] * REPEATS:  # interleaved, so that a busy moment of the machine falls on all alike
        start = time.perf_counter()
        work(name)
        seconds[name].append(time.perf_counter() - start)
    costs: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        peak = peak_bytes(partial(work, name), student.device)
        costs[name] = {"value": value, "seconds": statistics.median(seconds[name]), "peak_bytes": peak}
    return {
        "takes": takes, "shape": student.shape, "student_bytes": student.nbytes, "repeats": REPEATS,
        "dtypes": [str(side.dtype).removeprefix("torch.") for side in (student, teacher)],
        "memory_method": MEMORY_METHODS[student.device.type], "costs": costs,
    }  # fmt: skip


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    # From the exported trace, because the profiler's own tables hide a peak within an operator.
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sizes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate(size for _, size in sizes))  # a release is a negative size
