"""Our look-alikes against public checks of the same tasks: which wrong answers do they accept?

    git clone https://github.com/Exorust/TorchLeet FOLDER/TorchLeet
    git clone https://github.com/duoan/TorchCode FOLDER/TorchCode
    git clone https://github.com/stanford-cs336/assignment5-alignment FOLDER/assignment5-alignment
    PYTHONPATH=. python tests/dev/public_checks.py FOLDER

Their code is read from FOLDER at run time and is no part of this repository. It is executed here: look at it first. The table goes
into docs/teaching.md. A check that cannot be run (a file of theirs is missing) is left out, with one line that says why.
"""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lookalikes_a
import lookalikes_b

from pdpo import dpo_loss


def look_alikes(task: str) -> dict[str, Callable]:
    """By the words that our check answers with."""
    return next(each.LOOKALIKES[task] for each in (lookalikes_a, lookalikes_b) if task in each.LOOKALIKES)


def right(pc, pr, rc, rr, beta):
    return dpo_loss(pc, pr, rc, rr, beta=beta).losses


def right_token_sums(logits, input_ids, response_mask):
    logps = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    return (logps * response_mask[:, 1:]).sum(1)


def is_wrong_there(task: str, function: Callable) -> bool:
    """Whether a look-alike differs from the right answer on what these checks could give: a batch's mean, no mask."""
    generator = torch.Generator().manual_seed(1)
    if task == "dpo_loss":
        drawn = -10 * torch.rand(4, 8, generator=generator)
        far = torch.tensor([[-9.0, -9e4], [-9e4, -9.0]] + [[-9.0, -9.0]] * 2)
        inputs = [(*drawn, beta) for beta in (0.1, 0.5, 1.0)] + [(*far, 0.5)]
    else:
        ids = torch.randint(7, (3, 5), generator=generator)
        inputs = [(2 * torch.randn(3, 5, 7, generator=generator), ids, torch.ones(3, 5, dtype=torch.bool))]
    for arguments in inputs:
        outcomes = []
        for each in (function, right if task == "dpo_loss" else right_token_sums):
            copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
            leaves = [x.requires_grad_() for x in copies[:2] if isinstance(x, torch.Tensor) and x.is_floating_point()]
            try:
                value = each(*(x + 0 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in copies))
                value = value.mean() if task == "dpo_loss" else value
                gradients = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
                outcomes.append(torch.cat([each.flatten() for each in (value, *gradients)]))
            except Exception:
                return True
        if outcomes[0].shape != outcomes[1].shape or not torch.allclose(*outcomes, atol=1e-4):
            return True
    return False


def accepts(check: Callable, function: Callable) -> bool:
    """Whether a check ends without an exception."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            check(function)
        except Exception:
            return False
    return True


def torchleet(folder: Path) -> dict[str, Callable]:
    """Their validation cell, with dpo_loss, or the sequence log-probabilities, replaced; the rest is their own solution."""
    path = folder / "v3" / "alignment-training" / "dpo" / "dpo_SOLN.ipynb"
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    validation = next(i for i, cell in enumerate(cells) if "Validation" in cell)

    def run(**replaced):
        names: dict = {}
        for cell in cells[:validation]:
            exec(cell, names)
        exec(cells[validation], names | {name: function(names) for name, function in replaced.items()})

    def loss(function):
        run(dpo_loss=lambda names: lambda *logps, beta=0.1: function(*logps, beta).mean())

    def logps(function):
        run(get_batch_logps=lambda names: lambda model, ids: function(model(ids), ids, torch.ones(ids.shape, dtype=torch.bool)))

    return {"dpo_loss": loss, "sequence_logps": logps}


def torchcode(folder: Path) -> dict[str, Callable]:
    """The five tests of their task."""
    names: dict = {}
    exec((folder / "torch_judge" / "tasks" / "dpo_loss.py").read_text(), names)

    def loss(function):
        for test in names["TASK"]["tests"]:
            answer = {"answer": lambda *logps, beta=0.1: function(*logps, beta).mean()}
            exec(test["code"].replace("{fn}", "answer"), answer)

    return {"dpo_loss": loss}


def cs336(folder: Path) -> dict[str, Callable]:
    """Their test compares the loss of one pair at beta 0.5 with one number; it needs the weights of its two fixtures."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    fixtures = folder / "tests" / "fixtures"
    models = [
        GPT2LMHeadModel.from_pretrained(fixtures / name, local_files_only=True).eval()
        for name in ("tiny-gpt2", "tiny-gpt2-ref")
    ]
    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    template = (folder / "cs336_alignment" / "prompts" / "alpaca_sft.prompt").read_text()

    def logps(model, response):
        before, _ = template.format(instruction="The quick brown fox jumps over", response="\0").split("\0")
        start = tokenizer(before).input_ids
        ids = torch.tensor([start + tokenizer(response).input_ids + [tokenizer.eos_token_id]])
        with torch.no_grad():
            return right_token_sums(model(ids).logits, ids, torch.arange(ids.shape[1])[None] >= len(start))

    def loss(function):
        values = [logps(model, text) for model in models for text in ("the lazy dog.", "their crazy frog.")]
        assert torch.isclose(function(*values, 0.5).mean(), torch.tensor(0.5785), atol=1e-4)

    return {"dpo_loss": loss}


CHECKS = {"TorchLeet": torchleet, "TorchCode": torchcode, "assignment5-alignment": cs336}


def main(folder: Path) -> None:
    solutions = {"dpo_loss": right, "sequence_logps": right_token_sums}
    print(
        "| public check, commit | task | accepts the right answer | look-alikes accepted | of which are |\n|---|---|---|---|---|"
    )
    left_out = []
    for name, load in CHECKS.items():
        try:
            checks = load(folder / name)
        except Exception as error:
            left_out.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        commit = subprocess.run(
            ["git", "-C", folder / name, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
        ).stdout
        for task, check in checks.items():
            wrong = {words: function for words, function in look_alikes(task).items() if is_wrong_there(task, function)}
            accepted = [words for words, function in wrong.items() if accepts(check, function)]
            shown = "; ".join(accepted)
            print(
                f"| {name} {commit.strip()} | {task} | {accepts(check, solutions[task])} | {len(accepted)} of {len(wrong)} | {shown} |"
            )
    print("\n".join(["", *left_out]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
