"""Distil from a recording: the teacher has spoken, and need not be there.

    kl-gpu record TEACHER --text notes.txt --as topk --out teacher
    python examples/distill_offline.py teacher STUDENT

trains a model of transformers by `kl_gpu.linear_topk_div`, or of `--as hidden` by `kl_gpu.linear_div`.
"""

import sys
from pathlib import Path

import _report as report
import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoModelForCausalLM

from kl_gpu import linear_div, linear_topk_div
from kl_gpu.compare import Recording


@report.one_line_errors("distill_offline.py")
def main(arguments: list[str] | None = None) -> int:
    parser = report.Parser(prog="distill_offline.py", description="Distil from what `kl-gpu record` left.")
    add = parser.add_argument
    add("recording", type=Path, help="a folder, recorded --as topk or hidden")
    add("student", help="a folder or a name; it reads the teacher's tokens")
    add("--steps", metavar="N", type=report.at_least(1), default=200, help="default: %(default)s")
    add("--out", metavar="PATH", type=Path, default=Path("out/student"), help="default: %(default)s")
    settings = parser.parse_args(arguments)
    try:
        recording = Recording(settings.recording)
        divergence = {"topk": linear_topk_div, "hidden": linear_div}[recording.form]
        student = AutoModelForCausalLM.from_pretrained(settings.student, dtype=torch.float32)
    except (KeyError, OSError, ValueError) as error:
        raise report.BadInput(f"{error} (wanted: a recording --as topk or hidden, and a student)") from None
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    chosen = RandomSampler(recording, num_samples=2 * settings.steps)
    for step, batch in enumerate(DataLoader(recording, batch_size=2, sampler=chosen), 1):
        hidden = student.model(input_ids=batch["input_ids"]).last_hidden_state[:, recording.positions]
        loss = divergence(hidden, student.lm_head.weight, **recording.teacher(batch))  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: {loss.item():.4f} nats a token", flush=True)
    student.save_pretrained(settings.out)
    print(settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
