"""A policy gradient with a KL penalty, and the measure of a policy on held-out prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _interrupt import StopBetweenSteps
from _penalties import penalty, token_logprobs
from _reward import share_that_parses
from _rlhf_report import HeldOut, PolicyRun
from _rlhf_settings import RlhfSettings
from _sampling import complete
from torch import Tensor

from kl_gpu import kl_div

_CHECKPOINTS = 4
_MEASURED_AT_ONCE = 64  # completions, so that their logits stay small


@dataclass(frozen=True)
class Game:
    """What every form of the penalty is tried on: a reference, prompts, and a reward."""

    settings: RlhfSettings
    reference: Any
    tokeniser: Any
    prompts: Tensor  # [count, time], to train on
    held_out: Tensor  # the same, to measure on

    def rewards(self, ids: Tensor) -> Tensor:
        """Of rows of prompt and completion, [batch, time]: [batch]."""
        length = self.settings.prompt
        prompts = self.tokeniser.batch_decode(ids[:, :length])
        completions = self.tokeniser.batch_decode(ids[:, length:])
        return torch.tensor([share_that_parses(*texts) for texts in zip(prompts, completions, strict=True)])

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """For each token of the completions, the logits it was drawn from: [batch, tokens, V], a view."""
        return model(input_ids=ids, use_cache=False).logits[:, self.settings.prompt - 1 : -1]

    def loss(self, policy: Any, form: str, ids: Tensor, rewards: Tensor) -> Tensor:
        """Its gradient estimates that of −E[reward] + β KL(policy‖reference); `policy` has drawn `ids`."""
        tokens = ids[:, self.settings.prompt :]
        logits = self.logits(policy, ids)
        with torch.no_grad():
            ref_logits = self.logits(self.reference, ids)
        kl = penalty(form, logits, ref_logits, tokens, self.settings.backend)
        advantages = self._above_siblings(rewards[:, None] - self.settings.coefficient * kl.later)
        per_token = -advantages * token_logprobs(logits, tokens) + self.settings.coefficient * kl.loss
        return per_token.sum(1).mean()

    def _above_siblings(self, returns: Tensor) -> Tensor:
        """Less the mean of the prompt's other completions: less variance, and the gradient's mean stays."""
        grouped = returns.unflatten(0, (-1, self.settings.samples))
        others = (grouped.sum(1, keepdim=True) - grouped) / (self.settings.samples - 1)
        return (grouped - others).flatten(0, 1)

    @torch.no_grad()
    def measure(self, policy: Any) -> HeldOut:
        generator = torch.Generator().manual_seed(self.settings.seed)
        rewards, divergences, sample = [], [], ""
        for prompts in self.held_out.split(_MEASURED_AT_ONCE):
            ids = complete(policy, prompts, self.settings.tokens, generator)
            logits, ref_logits = self.logits(policy, ids), self.logits(self.reference, ids)
            kl = kl_div(
                logits, ref_logits, direction="reverse", reduction="none", backend=self.settings.backend
            )
            rewards.append(self.rewards(ids))
            divergences.append(kl.sum(1))
            sample = sample or self.tokeniser.decode(ids[0])
        return HeldOut(*_mean_and_error(torch.cat(rewards)), *_mean_and_error(torch.cat(divergences)), sample)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.double().mean().item(), values.double().std().item() / math.sqrt(len(values))


def improve(policy: Any, form: str, game: Game, run: PolicyRun, notify: Callable[[], None]) -> None:
    """Trains `policy` for `run.steps` steps and writes its curves into `run` as they come."""
    settings = game.settings
    # Prompts and the noise that tokens are drawn with are the same for every form.
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.rate)
    checkpoints = {round(run.steps * part / _CHECKPOINTS) for part in range(_CHECKPOINTS + 1)}
    policy.eval()
    with StopBetweenSteps() as interrupt:
        run.held_out[0] = game.measure(policy)
        notify()
        for _ in range(run.steps):
            interrupt.check()
            start = time.perf_counter()
            chosen = torch.randint(len(game.prompts), (settings.prompts,), generator=generator)
            prompts = game.prompts[chosen].repeat_interleave(settings.samples, 0)
            ids = complete(policy, prompts, settings.tokens, generator)
            rewards = game.rewards(ids)
            game.loss(policy, form, ids, rewards).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.reward.append(rewards.mean().item())
            run.seconds += time.perf_counter() - start
            if run.done in checkpoints:
                run.held_out[run.done] = game.measure(policy)
            notify()
