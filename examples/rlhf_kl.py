"""Train a small language model by policy gradient, with the KL penalty in five forms, and compare them.

    python examples/rlhf_kl.py

pretrains a small Llama on Python's standard library, and from this reference trains a policy for each form of
the penalty, all else the same. The reward is the share of the lines written that parse as Python. The forms:

    none; kl_gpu.kl_div(policy_logits, ref_logits, direction="reverse"), exact at every token;
    kl_gpu.kl_penalty(policy_logprobs, ref_logprobs, "k1"), in the reward; "k2" and "k3", as a loss.
"""

import argparse
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import _language_models as lm
import _report as report
import torch
from _language_models import share_that_parses
from _report import Parser, add_common_options, at_least
from torch import Tensor

from kl_gpu import kl_div, kl_penalty, token_logprobs

OPTIONS = {
    "--pretraining": (at_least(1), 300, "steps of the reference"),
    "--steps": (at_least(1), 32, "of each policy"),
    "--prompts": (at_least(1), 16, "a step"),
    "--samples": (at_least(2), 4, "completions of each prompt"),
    "--prompt": (at_least(2), 24, "tokens of a prompt"),
    "--tokens": (at_least(1), 40, "of a completion"),
    "--held-out": (at_least(2), 128, "prompts to measure on"),
    "--rate": (at_least(1e-9, float), 5e-4, "learning rate of the policies"),
    "--coefficient": (at_least(1e-9, float), 0.02, "the penalty's: reward per nat of a completion's KL"),
}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="rlhf_kl.py", description="Train a policy for each form of the KL penalty, on CPU.")
    for option, (kind, default, meaning) in OPTIONS.items():
        meaning += "; default: %(default)s"
        parser.add_argument(option, metavar="N", type=kind, default=default, help=meaning)
    add_common_options(parser)
    return parser.parse_args(arguments)


# Each with where it goes: k1 in the reward, as in PPO for language models; k3 in the loss, as in GRPO; and k2
# like k3, because in the reward neither has the KL's gradient.
FORMS = {"none": "", "exact": "loss and reward", "k1": "reward", "k2": "loss", "k3": "loss"}
Sides = tuple[Tensor, Tensor]  # the reward's and the loss's, `[batch, time]` each
VOCABULARY = 2_048  # of 32 000 tokens, half a minute of pretraining would teach only the most frequent


def exact_kl(policy_logits: Tensor, ref_logits: Tensor, backend: str | None) -> Tensor:
    """KL(policy‖reference) at every token, `[batch, time]`, of logits `[batch, time, V]`."""
    return kl_div(policy_logits, ref_logits, direction="reverse", reduction="none", backend=backend)


def penalty(form: str, policy: Tensor, reference: Tensor, tokens: Tensor, backend: Any = None) -> Sides:
    """In nats, what to take from the reward of the token at t, without a gradient, and what to differentiate.

    In the reward, the KL at a token trains only what leads there; as a loss, only what the policy does there.
    The exact form uses it as both, which is the whole gradient: docs/rlhf.md has each form's.
    """
    nothing = torch.zeros(tokens.shape, dtype=policy.dtype)
    if form == "none":
        return nothing, nothing
    if form == "exact":
        kl = exact_kl(policy, reference, backend)
        return to_go(kl.detach()) - kl.detach(), kl
    log_q, log_p = (token_logprobs(logits, tokens) for logits in (policy, reference))
    estimate = kl_penalty(log_q, log_p, form)  # type: ignore[arg-type]
    return (to_go(estimate.detach()), nothing) if form == "k1" else (nothing, estimate)


def to_go(values: Tensor) -> Tensor:
    """At each t the sum of `values`, `[batch, time]`, from t on."""
    return values.flip(1).cumsum(1).flip(1)


@dataclass(frozen=True)
class Game:
    """What every form of the penalty is tried on: a reference, prompts, and a reward."""

    settings: Any
    reference: Any
    tokeniser: Any
    prompts: Tensor  # [count, time], to train on
    held_out: Tensor  # the same, to measure on

    def rewards(self, ids: Tensor) -> Tensor:
        """Of rows of prompt and completion, [batch, time]: [batch]."""
        prompts, completions = map(self.tokeniser.batch_decode, ids.tensor_split([self.settings.prompt], 1))
        return torch.tensor([share_that_parses(*texts) for texts in zip(prompts, completions, strict=True)])

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """For each token of the completions, the logits it was drawn from: [batch, tokens, V], a view."""
        return model(input_ids=ids, use_cache=False).logits[:, self.settings.prompt - 1 : -1]

    def loss(self, policy: Any, form: str, ids: Tensor, rewards: Tensor) -> Tensor:
        """Its gradient estimates that of −E[reward] + β KL(policy‖reference); `policy` has drawn `ids`."""
        tokens, beta = ids[:, self.settings.prompt :], self.settings.coefficient
        logits, ref_logits = self.logits(policy, ids), self.logits(self.reference, ids)
        later, kl = penalty(form, logits, ref_logits, tokens, self.settings.backend)
        # Less the mean of the prompt's other completions: less variance, and the gradient's mean stays.
        returns = (rewards[:, None] - beta * later).unflatten(0, (-1, self.settings.samples))
        others = (returns.sum(1, keepdim=True) - returns) / (self.settings.samples - 1)
        advantages = (returns - others).flatten(0, 1)
        return (-advantages * token_logprobs(logits, tokens) + beta * kl).sum(1).mean()

    @torch.no_grad()
    def measure(self, policy: Any) -> dict[str, Any]:
        """Means over completions of the held-out prompts, their standard errors, and a completion."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        samples, batches = [], []
        for prompts in self.held_out.split(64):  # not all at once, so that the logits stay small
            ids = lm.complete(policy, prompts, self.settings.tokens, generator)
            kl = exact_kl(self.logits(policy, ids), self.logits(self.reference, ids), self.settings.backend)
            batches.append(torch.stack([self.rewards(ids).double(), kl.sum(1).double()]))
            samples += self.tokeniser.batch_decode(ids)
        both = torch.cat(batches, 1)
        errors = both.std(1) / math.sqrt(len(samples))
        found = {"reward": both[0].mean().item(), "reward_error": errors[0].item()}
        found |= {"kl": both[1].mean().item(), "kl_error": errors[1].item()}
        return {**found, "sample": samples[0]}


def improve(policy: Any, game: Game, run: report.Run) -> None:
    """Trains `policy` for `run.steps` steps, with the form of penalty that `run` is named after."""
    settings = game.settings
    generator = torch.Generator().manual_seed(settings.seed)  # the same prompts and noise for every form
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.rate)
    for _ in run.each_step(partial(game.measure, policy)):
        chosen = torch.randint(len(game.prompts), (settings.prompts,), generator=generator)
        prompts = game.prompts[chosen].repeat_interleave(settings.samples, 0)
        ids = lm.complete(policy, prompts, settings.tokens, generator)
        rewards = game.rewards(ids)
        game.loss(policy, run.name, ids, rewards).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.curve.append(rewards.mean().item())


def study(settings: Any) -> int:
    """Returns the exit code. Ctrl-C ends it early; what was measured until then is reported all the same."""
    lm.check(settings.out, settings.backend)
    perplexity = "held-out perplexity {perplexity:,.1f}"
    pretraining = report.Run("reference", "cross-entropy", settings.pretraining, perplexity)
    measurement = "held-out reward {reward:.3f}, KL(policy‖reference) {kl:.3f}"
    runs = [report.Run(form, applied, settings.steps, measurement) for form, applied in FORMS.items()]
    sequence = settings.prompt + settings.tokens
    with report.until_interrupted(runs):
        with report.console.status("Reading the text …"):
            documents, others = lm.read(settings.text)
            tokeniser = lm.trained_tokeniser(documents, VOCABULARY)
            training = lm.windows(tokeniser, documents, sequence)
            held_out = lm.windows(tokeniser, others, sequence)
            prompts = lm.prompts(training, settings.prompt)
            asked = lm.prompts(lm.spread(held_out, settings.held_out), settings.prompt)
        columns = len(tokeniser)
        reference = lm.small_llama((128, 2), columns, sequence, settings.seed)
        report.say(
            f"{settings.text or lm.LIBRARY}: {training.numel():,} tokens to train on.\n"
            f"A reference of {reference.num_parameters() / 1e6:,.1f} M parameters, {columns:,} columns; "
            f"a policy for each penalty, {settings.steps} steps of {settings.prompts} prompts × "
            f"{settings.samples} completions.\nReward: the share of the lines written that parse as Python."
        )
        options = argparse.Namespace(batch=16, rate=3e-3, seed=settings.seed)
        measure = partial(lm.measured, reference, lm.spread(held_out, 32), options.batch)
        lm.train(pretraining, reference, lm.label_loss, training, options, measure)
        game = Game(settings, reference.eval().requires_grad_(False), tokeniser, prompts, asked)
        for run in runs:
            improve(copy.deepcopy(reference).requires_grad_(), game, run)

    beta, asking = settings.coefficient, f"{len(asked)} held-out prompts, {settings.tokens} tokens each"
    report.say(f"\nCompletions of {asking}; ± is a standard error:")
    plot = report.show_policies(runs, beta)
    report.say(f"KL in nats a completion, exact at every token; objective: reward − {beta:g} KL.")
    setup = {"training_tokens": training.numel(), "held_out_prompts": len(asked), "columns": columns}
    report.save("rlhf_kl", settings, [pretraining, *runs], plot, setup=setup)
    return 0 if len(runs[-1].curve) == settings.steps else 130


@report.one_line_errors("rlhf_kl.py")
def main(arguments: list[str] | None = None) -> int:
    return study(parsed(arguments))


if __name__ == "__main__":
    sys.exit(main())
