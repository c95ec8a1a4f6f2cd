"""What the examples share of language models: text, small Llamas, training, sampling, what a loss costs."""

import ast
import contextlib
import itertools
import math
import statistics
import sysconfig
import timeit
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _report as report
import torch
import torch.nn.functional as F
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate as cosine_schedule

from kl_gpu import kl_div

IGNORED = -100  # the label of a position that counts in no loss, as in PyTorch, transformers and kl_gpu
# Beside the standard library, its folder may hold what was installed since and tests that not everyone has.
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
LIBRARY = "Python's standard library"  # where no other text is given
HELD_OUT_EVERY = 10
TOKENISER_CHARACTERS = 8_000_000  # enough text for 32 000 merges, and a second of training
START = "<|endoftext|>"  # between documents, so at the start of each

Loss = Callable[[Tensor, Tensor], Tensor]  # of the student's logits or hidden states, and the teacher's
Objective = Callable[[Any, Tensor], Tensor]  # of the model that trains, or its logits, and a batch of rows


def read(path: Path | None) -> tuple[list[str], list[str]]:
    """Documents to train on, and held-out files' ones, under `path` or of Python's standard library."""
    root = path or Path(sysconfig.get_path("stdlib"))
    suffixes, skipped = ((".py", ".md", ".txt"), set()) if path else ((".py",), NOT_THE_LIBRARY)
    documents: list[str] = []
    # By their POSIX names, because the order of a folder's entries differs between file systems.
    for file in [root] if root.is_file() else sorted(root.rglob("*"), key=Path.as_posix):
        names = file.relative_to(root).parts
        if names and (file.suffix not in suffixes or any(n in skipped or n[0] == "." for n in names)):
            continue
        with contextlib.suppress(UnicodeDecodeError, OSError):
            documents += filter(str.strip, [file.read_text("utf-8")])  # none that is blank
    if not documents:
        raise report.BadInput(f"--text: no UTF-8 text at {root} (of a folder, *.py, *.md and *.txt are read)")
    if len(documents) == 1:
        lines = documents[0].splitlines(keepends=True)
        cut = len(lines) - max(1, len(lines) // HELD_OUT_EVERY)
        documents = ["".join(lines[:cut]), "".join(lines[cut:])]
    every = min(HELD_OUT_EVERY, len(documents))
    return [x for i, x in enumerate(documents, 1) if i % every], documents[every - 1 :: every]


def trained_tokeniser(documents: Sequence[str], vocabulary: int = 32_000) -> Any:
    """Byte-level BPE, trained on a part of `documents` that is spread over all of them."""
    share = min(1.0, TOKENISER_CHARACTERS / max(1, sum(map(len, documents))))
    sample = (document[: int(len(document) * share) + 1] for document in documents)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sample, vocabulary, min_frequency=0, show_progress=False, special_tokens=[START])
    tokeniser = Tokenizer.from_str(bpe.to_str())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokeniser, bos_token=START, eos_token=START)


def windows(tokeniser: Any, documents: Sequence[str], sequence: int, device: str = "cpu") -> Tensor:
    """Each document behind a start token, cut into rows, [count, sequence], padded with `IGNORED`."""
    rows = []
    for encoded in tokeniser(list(documents), add_special_tokens=False)["input_ids"]:
        tokens = torch.tensor([tokeniser.bos_token_id, *encoded])
        rows.append(F.pad(tokens, (0, -len(tokens) % sequence), value=IGNORED).view(-1, sequence))
    labels = torch.cat(rows).to(device)
    # The first position of a row is predicted by none, so a row needs a label behind it to be of use.
    useful = (labels[:, 1:] != IGNORED).any(1)
    if not useful.any():
        raise report.BadInput(f"the text is too short for windows of {sequence} tokens")
    return labels[useful]


def predicted(rows: Tensor) -> int:
    """The labels of `rows`; a row's first counts as none, because nothing stands before it to predict it."""
    return int((rows[:, 1:] != IGNORED).sum())


def spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` of them, evenly spaced, so that all the documents have their say."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


def prompts(rows: Tensor, length: int) -> Tensor:
    """The rows' first tokens, where none of those is padding."""
    whole = (rows[:, 1:length] != IGNORED).all(1)
    if whole.sum() < 2:  # of one, there is no standard error
        raise report.BadInput(f"the text is too short for prompts of {length} tokens")
    return rows[whole, :length]


def batches(rows: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches, a new shuffle each time round; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order = RandomSampler(range(len(rows)), num_samples=size * steps, generator=generator)
    return (rows[chosen] for chosen in BatchSampler(order, size, drop_last=False))


def small_llama(size: tuple[int, int], vocabulary: int, positions: int, seed: int) -> Any:
    """With random weights, and a head of its own: at this size that learns faster than one that is tied."""
    torch.manual_seed(seed)
    hidden, layers = size
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, max_position_embeddings=positions, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def forward(model: Any, rows: Tensor, **more: Any) -> Any:
    """The model's output; the padding of `rows` stands behind the text, where no causal model looks."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
        return model(input_ids=rows.clamp_min(0), use_cache=False, **more)


def label_loss(model: Any, rows: Tensor) -> Tensor:
    return forward(model, rows, labels=rows).loss


@torch.no_grad()
def measured(model: Any, held_out: Tensor, batch: int, kl: Objective | None = None) -> dict[str, float]:
    """The perplexity; `kl` sums the KL(teacher‖model) over a batch, given the model's logits of it."""
    surprise = divergence = 0.0
    for rows in held_out.split(batch):
        output = forward(model, rows, labels=rows)
        surprise += output.loss.item() * predicted(rows)
        divergence += kl(output.logits, rows).item() if kl else 0.0
    tokens = predicted(held_out)
    perplexity = math.exp(surprise / tokens)
    return {"kl": divergence / tokens, "perplexity": perplexity} if kl else {"perplexity": perplexity}


def train(
    run: report.Run, model: Any, objective: Objective, training: Tensor, settings: Any,
    measure: Callable[[], dict[str, float]],
) -> None:  # fmt: skip
    """`run.steps` steps; the rate rises over a tenth of them, then falls to a tenth of its peak."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.01)
    rising = max(1, round(0.1 * run.steps))
    schedule = cosine_schedule(optimizer, rising + 1, run.steps + 1, min_lr_rate=0.1)
    shuffled = batches(training, settings.batch, run.steps, settings.seed)
    for _, rows in zip(run.each_step(measure), shuffled, strict=True):
        loss = objective(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.curve.append(loss.item())


def check(out: Path, backend: str | None, device: str = "cpu") -> None:
    """Finds out before the work, not behind it, what would end it, and has a GPU give the same bits again."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise report.BadInput(f"--out: cannot write to {out}: {error.strerror}") from error
    if device != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # This would fill every new tensor, and so slow what is timed.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        probe = torch.zeros(1, 2, device=device)
        kl_div(probe, probe, backend=backend)
    except (AssertionError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise report.BadInput(f"--device {device}, --backend {backend or 'by choice'}: {reason}") from error


@torch.no_grad()
def complete(model: Any, prompts: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[batch, time + count]: `prompts` go on, with no token ruled out, lest the KL's estimators be biased."""
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
    """The share in [0, 1] of the finished lines that parse; of none, comments aside, it is 0."""
    first, *others = completion.split("\n")
    lines = [prompt.rpartition("\n")[2] + first, *others][:-1]
    judged = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return sum(map(line_parses, judged)) / len(judged) if judged else 0.0


def costs(losses: dict[str, Loss], student: Tensor, teacher: Tensor) -> dict[str, dict[str, float]]:
    """What each loss comes to on the same logits, or hidden states, and takes forward and backward."""

    def work(loss: Loss) -> float:
        leaf = student.detach().requires_grad_()
        value = loss(leaf, teacher)
        value.backward()
        return value.item()  # waits for the device

    runs = {name: partial(work, loss) for name, loss in losses.items()}
    found = {name: {"value": run()} for name, run in runs.items()}  # which also warms up
    # In turn, so that what else the machine does slows all of them alike.
    seconds = [{name: timeit.timeit(run, number=1) for name, run in runs.items()} for _ in range(7)]
    for name, run in runs.items():
        found[name]["seconds"] = statistics.median(each[name] for each in seconds)
        found[name]["peak_bytes"] = peak_bytes(run, student.device)
    return found


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that `work` has allocated at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    # The raw events, because the profiler's own tables hide a peak within an operator.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))  # a release is a negative size
