"""GAE, the clipped losses, whitening and RLOO's advantage against the very lines of TRL that compute them, inside its training loops.

TRL need not be installed, only unpacked: `pip download --no-deps trl==0.24.0` (1.16.0 has no PPO any more) and 1.16.0, unzip each into
a folder, then `TRL_PPO=folder TRL_RLOO=folder PYTHONPATH=. python -m pytest tests/dev/test_rl_against_trl.py`.
"""

import os
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pdpo.losses import gae, ppo_loss
from pdpo.rl import rloo_advantages, value_loss, whitened

ARGS = SimpleNamespace(gamma=0.9, lam=0.8, cliprange=0.2, cliprange_value=0.3)


def lines(variable: str, file: str, first: str, last: str) -> str:
    """The source between two lines, the first included, without its indentation."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set; the first lines of this file say how")
    text = (Path(os.environ[variable]) / "trl" / file).read_text(encoding="utf-8")
    start = text.rindex("\n", 0, text.index(first)) + 1
    return textwrap.dedent(text[start : text.rindex("\n", 0, text.index(last, start)) + 1])


def numbers():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [5]])
    return mask, [torch.randn(4, 6, generator=generator).masked_fill(~mask, 0.0) for _ in range(6)]


def core() -> dict:
    there = {"torch": torch, "Optional": None, "empty_cache": lambda: None}
    exec(lines("TRL_PPO", "core.py", "def masked_mean", "class LengthSampler").replace("Optional[bool]", "bool"), there)
    return there


def test_advantages_returns_and_whitening_are_trls():
    mask, (rewards, values, *_) = numbers()
    there = core() | {"rewards": rewards, "values": values, "responses": rewards, "args": ARGS, "padding_mask": ~mask}
    exec(lines("TRL_PPO", "trainer/ppo_trainer.py", "lastgaelam = 0", "# Do multiple epochs"), there)
    advantages = gae(rewards, values, gamma=0.9, lam=0.8)
    torch.testing.assert_close(whitened(advantages, mask), there["advantages"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((advantages + values)[mask], there["returns"][mask])


def test_ppos_losses_and_their_gradients_are_trls():
    mask, (new_logps, old_logps, new_values, old_values, returns, advantages) = numbers()
    ours, theirs = ([each.clone().requires_grad_() for each in (new_logps, new_values)] for _ in range(2))
    there = core() | {
        "vpred": theirs[1], "mb_values": old_values, "mb_return": returns, "new_logprobs": theirs[0], "mb_logprobs": old_logps,
        "mb_advantage": advantages, "padding_mask": ~mask, "padding_mask_p1": ~mask, "micro_batch_inds": slice(None), "args": ARGS,
    }  # fmt: skip
    exec(lines("TRL_PPO", "trainer/ppo_trainer.py", "vpredclipped = torch.clamp", "loss = pg_loss +"), there)
    policy = ppo_loss(ours[0], old_logps, advantages, clip=0.2)[mask].mean()
    value = value_loss(ours[1], old_values, returns, clip=0.3)[mask].mean()
    torch.testing.assert_close(policy, there["pg_loss"])
    torch.testing.assert_close(value, there["vf_loss"])
    (policy + 0.1 * value).backward()
    (there["pg_loss"] + 0.1 * there["vf_loss"]).backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_rloos_advantages_and_loss_are_trls():
    generator = torch.Generator().manual_seed(1)
    rewards, logps, old_logps = torch.randn(12, generator=generator), *torch.randn(2, 12, generator=generator)
    there = {"torch": torch, "rewards": rewards, "num_generations": 4, "nanstd": lambda x, dim=0: x.std(dim)}
    exec(lines("TRL_RLOO", "trainer/rloo_trainer.py", "grouped_rewards = rewards.view", "# Normalize advantages over"), there)
    advantages = rloo_advantages(rewards.view(3, 4)).flatten()
    torch.testing.assert_close(advantages, there["advantages"])
    me = SimpleNamespace(epsilon_low=0.2, epsilon_high=0.2)
    there |= {"self": me, "log_ratio": logps - old_logps, "inputs": {"advantages": advantages}}
    exec(lines("TRL_RLOO", "trainer/rloo_trainer.py", "coef_1 = torch.exp", "# Log the metrics"), there)
    torch.testing.assert_close(ppo_loss(logps, old_logps, advantages, clip=0.2).mean(), there["loss"])
