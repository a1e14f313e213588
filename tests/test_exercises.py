"""The checks of the exercises can fail, each in its own words, and right answers of another form pass; stubs are up to date."""

import functools
import importlib
import random
import re
import runpy
from pathlib import Path

import nbformat
import pytest
import torch

import pdpo
from pdpo import exact, exercises, logps, losses, preferences
from pdpo.exercises import core

ROOT = Path(__file__).resolve().parent.parent
DATA = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("lookalikes_*.py"))]
LOOKALIKES = {name: found for module in DATA for name, found in module.LOOKALIKES.items()}
SECOND = {name: function for module in DATA for name, function in module.SECOND.items()}
TASKS = exercises.tasks()
every_task = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def any_precision(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def drawn_inputs(monkeypatch, request):
    """Each test draws its own inputs, the same ones every time: a check that is right 99 times in 100 must not fail CI by chance."""
    monkeypatch.setattr(core, "SEEDS", random.Random(request.node.name))


def verdict(name, function):
    """The message of a check that must fail."""
    with pytest.raises(AssertionError) as error:
        exercises.check(name, function)
    assert name not in exercises._passed
    return str(error.value)


def cause(message):
    return re.search(r"^likely cause: (.*)", message, re.MULTILINE)[1]


# Every task


def test_there_are_look_alikes_and_a_second_solution_for_every_task():
    assert set(TASKS) == set(LOOKALIKES) == set(SECOND)
    assert len(TASKS) >= 24 and min(map(len, LOOKALIKES.values())) >= 4 and sum(map(len, LOOKALIKES.values())) >= 100


@every_task
def test_each_look_alike_is_rejected_in_words_of_its_own(name, any_precision):
    causes = {words: cause(verdict(name, function)) for words, function in LOOKALIKES[name].items()}
    assert {words: found for words, found in causes.items() if words not in found} == {}
    assert len(set(causes.values())) == len(causes)


@every_task
def test_a_right_answer_of_another_form_passes_every_time(name, any_precision, capsys):
    for _ in range(5):
        exercises.check(name, SECOND[name])
    assert capsys.readouterr().out == f"{name}: passed\n" * 5


@every_task
def test_each_mistake_that_a_check_knows_is_one(name, monkeypatch):
    monkeypatch.setattr(core, "_PACKAGE", "nowhere")  # the package's mistakes play the student
    found = [(cause(verdict(name, mistake)), diagnosis) for diagnosis, mistake in TASKS[name].mistakes]
    assert [said for said, diagnosis in found if said != diagnosis] == []


def constant_of(value):
    """The same form as value, every number 0.5 (or 1, or True)."""
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, 0.5 if value.is_floating_point() else 1).detach()
    if isinstance(value, tuple | list):
        return type(value)(constant_of(each) for each in value)
    return type(value)(0.5) if isinstance(value, int | float) else value


def raising(error):
    def function(*_):
        raise error

    return function


@every_task
def test_a_stub_crashes_and_nothing_are_never_passed(name):
    crash, calls = raising(KeyError("something broke")), []
    for function, words in [
        (crash, "KeyError: 'something broke'"),
        (raising(SystemExit(0)), "SystemExit"),
        (raising(core.Wrong("nothing", "nothing is wrong")), "it raised Wrong"),
        (raising(AssertionError("passed")), "AssertionError"),
        (raising(NotImplementedError("Your turn")), "still a stub (Your turn)"),
        (lambda *_: None, "got NoneType"),
        (lambda: 0, "TypeError"),
        (lambda *a: crash() if calls else (calls.append(1), SECOND[name](*a))[1], "KeyError"),
    ]:
        assert words in cause(verdict(name, function))


@every_task
def test_constants_are_never_passed(name):
    results = []
    exercises.check(name, lambda *arguments: (results.append(SECOND[name](*arguments)), results[-1])[1])
    verdict(name, lambda *_: results[0])
    if isinstance(results[0], torch.Tensor | tuple | int | float):
        verdict(name, lambda *arguments: constant_of(SECOND[name](*arguments)))


GIVEN_NO_TENSOR = {"frozen_reference", "clip_gradients", "symptoms", "planted_bug"}


@pytest.mark.parametrize("name", [name for name in TASKS if name not in GIVEN_NO_TENSOR])
def test_inputs_may_not_be_changed_in_place(name):
    def function(*arguments):
        result = SECOND[name](*arguments)
        tensor = next(each for each in arguments if isinstance(each, torch.Tensor))
        tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)
        return result

    assert "in place" in cause(verdict(name, function))


def key_of(value):
    """What a stored answer could be looked up by."""
    if isinstance(value, torch.Tensor):
        return str((value.tolist(), value.grad if value.is_leaf else None))
    if isinstance(value, list | tuple):
        return str([key_of(each) for each in value])
    if isinstance(value, torch.nn.Module):
        return key_of(list(value.parameters()))
    return str(getattr(value, "seed", value if isinstance(value, int | float | str) else type(value).__name__))


@every_task
def test_copies_of_right_values_do_not_pass(name):
    """A function that knows every answer of one check, and no other, fails in the next one."""
    seen = set()

    def recall(*arguments):
        key = key_of(arguments)
        if not recalling:
            seen.add(key)
        return SECOND[name](*arguments) if key in seen else None

    recalling = False
    exercises.check(name, recall)
    recalling = True
    verdict(name, recall)


@every_task
def test_a_call_of_the_package_is_not_the_students_own_work(name):
    def function(*arguments):
        pdpo.bradley_terry_logps(torch.zeros(1), torch.zeros(1))
        return SECOND[name](*arguments)

    assert "pdpo.preferences.bradley_terry_logps" in cause(verdict(name, function))


OWN = {
    "gumbel_ranking": lambda s, n: preferences.gumbel_ranking(s + n),
    "bradley_terry": lambda c, r, o: preferences.bradley_terry_logps(c, r, offset=o),
    "plackett_luce": pdpo.plackett_luce_logps,
    "log_partition": lambda p, s, b: exact.log_partition(p, s, beta=b),
    "optimal_policy": lambda p, s, b: exact.optimal_policy_logps(p, s, beta=b),
    "kl_divergence": exact.kl_divergence,
    "token_logps": logps.token_logps,
    "sequence_logps": pdpo.sequence_logps,
    "dpo_loss": lambda a, b, c, d, beta: losses.dpo_loss(a, b, c, d, beta=beta).losses,
}


WRAPS = [lambda f: f, functools.partial, lambda f: lambda *a: f(*a), functools.lru_cache]


@pytest.mark.parametrize("name, wrap", list(zip(OWN, WRAPS * 3, strict=False)))
def test_the_packages_own_function_is_refused_however_it_is_wrapped(name, wrap):
    assert re.search(r"the function calls pdpo\.\w+\.\w+, which is the answer", cause(verdict(name, wrap(OWN[name]))))


def test_a_function_that_cheats_only_where_nobody_seems_to_look_is_refused():
    calls = []

    def function(logits, input_ids, mask):
        calls.append(1)
        return (pdpo.sequence_logps if len(calls) % 2 else SECOND["sequence_logps"])(logits, input_ids, mask)

    assert "which is the answer" in cause(verdict("sequence_logps", function))


def test_a_result_that_claims_to_equal_everything_is_refused():
    class Agreeable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_, **__):
            return True

    assert "got Agreeable" in cause(verdict("plackett_luce", lambda s: torch.zeros(len(s)).as_subclass(Agreeable)))


# What a message says, hints, progress


def test_a_message_holds_property_input_expected_got_and_cause():
    message = verdict("optimal_policy", lambda p, s, beta: (p + beta * s).log_softmax(0))
    assert message.splitlines() == [
        "optimal_policy is not right yet",
        "property:     beta divides: at beta = 1/2 the same score counts twice, 9 to 1",
        "given:        reference_logps = [-0.69315, -0.69315], scores = [1.0986, 0], beta = 0.5",
        "expected:     [-0.10536, -2.3026]",
        "got:          [-0.45575, -1.0051]",
        "likely cause: beta multiplies the scores: a larger beta must stay closer to the reference, so it divides",
        "(stuck? hint('optimal_policy'))",
    ]


def test_a_message_shows_no_minus_zero():
    assert core.show(torch.tensor([-0.0, 1.5])) == "[0, 1.5]"


def test_an_argument_may_be_keyword_only_as_in_the_package():
    def optimal_policy(reference_logps, scores, *, beta):
        return SECOND["optimal_policy"](reference_logps, scores, beta)

    exercises.check("optimal_policy", optimal_policy)


def test_a_wrong_gradient_is_told_from_a_wrong_value():
    def half(c, r, o):
        return torch.nn.functional.logsigmoid(c - (r + r.detach()) / 2 - o)

    message = verdict("bradley_terry", half)
    assert "the gradient, too, is right" in message and "for rejected_scores" not in message
    assert "gradient in rejected_scores" in message and "part of the graph is cut" in message


@every_task
def test_hints_are_three_and_come_one_after_the_other(name, capsys):
    hints = TASKS[name].hints
    assert len(hints) == len(set(hints)) == 3 and all(len(each) > 20 for each in hints)
    exercises._hints_shown.clear()
    for _ in range(4):
        exercises.hint(name)
    assert [int(line[len(name) + 7]) for line in capsys.readouterr().out.splitlines()] == [1, 2, 3, 3]


def test_progress_tells_what_was_passed_and_forgets_what_no_longer_is(capsys):
    exercises._passed.clear()
    exercises.progress()
    assert "no task passed yet" in capsys.readouterr().out
    exercises.check("plackett_luce", SECOND["plackett_luce"])
    exercises.progress()
    assert "ex_02  [ ] winner_logps  [x] plackett_luce  [ ] first_places" in capsys.readouterr().out
    verdict("plackett_luce", raising(KeyError()))
    exercises.progress()
    assert "no task passed yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: exercises.check("dpo_los", print), "Did you mean 'dpo_loss'"),
        (lambda: exercises.check("x", print), "There are: "),
        (lambda: exercises.hint("xx"), "There are: "),
        (lambda: exercises.check("plackett_luce", torch.zeros(2)), "expected a function, got Tensor"),
    ],
)
def test_bad_input_raises_a_value_error_that_says_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_importing_the_exercises_loads_neither_transformers_nor_matplotlib(output):
    code = (
        "import pdpo.exercises, sys; pdpo.exercises.tasks(); print({'transformers', 'matplotlib', 'scipy'} & set(sys.modules))"
    )
    assert output("-c", code).strip() == "set()"


# The notebooks

SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("ex_*.ipynb"))
make_exercises = runpy.run_path(str(ROOT / "notebooks" / "make_exercises.py"))
every_notebook = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)


def code_of(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_the_exercises_are_made_from_the_solutions_as_they_are():
    folder = ROOT / "notebooks" / "exercises"
    assert {path.name for path in folder.iterdir() if path.suffix == ".ipynb"} == {path.name for path in SOLUTIONS}
    for path in SOLUTIONS:
        made = make_exercises["exercise"](nbformat.read(path, as_version=4))
        assert (folder / path.name).read_text(encoding="utf-8") == nbformat.writes(made) + "\n", (
            f"{path.name}: run `make exercises`"
        )


@every_notebook
def test_a_solution_is_a_whole_guided_path(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code, prose = code_of(notebook), "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for needed in (
        "| difficulty | importance | minutes | follows |",
        "**Solved.**",
        "*Predict",
        "**Write**",
        "**Explain",
        "**Takeaways**",
    ):
        assert needed in prose, needed
    assert f"blob/main/notebooks/solutions/{path.name}" in notebook.cells[0].source
    mine = [task for task in TASKS.values() if task.exercise == path.stem[:5]]
    for task in mine:
        assert f"<!-- hints: {task.name} -->" in prose and f'check("{task.name}", {task.name})' in "\n".join(code)
        (written,) = [cell for cell in code if f"def {task.name}(" in cell]
        on_one_line = re.sub(r"\s+", " ", written).replace("( ", "(").replace(", )", ")")
        assert task.signature in on_one_line and "# solution" in written
    assert mine and "".join(code).count("# solution") >= len(mine)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure to look at"
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [cell for cell in code if len(cell.splitlines()) > 32]


@every_notebook
def test_an_untouched_exercise_runs_to_its_first_stub_and_says_what_to_do(path):
    notebook = nbformat.read(ROOT / "notebooks" / "exercises" / path.name, as_version=4)
    code = code_of(notebook)
    assert not [cell for cell in code if "# solution" in cell or "# end" in cell]
    assert "**Solved.**" not in nbformat.writes(notebook) and "/notebooks/solutions/" not in nbformat.writes(notebook)
    name_of_first = next(re.search(r"write (\w+), run", cell)[1] for cell in code if "raise NotImplementedError" in cell)
    space, dtype = {"__name__": "__main__"}, torch.get_default_dtype()
    try:
        with pytest.raises(NotImplementedError, match=rf"Your turn: write {name_of_first}, .*hint\('{name_of_first}'\)"):
            for cell in code:
                exec(re.sub(r"^( *)%pip.*", r"\1pass", cell, flags=re.MULTILINE), space)
    finally:
        torch.set_default_dtype(dtype)
    with pytest.raises(AssertionError, match="still a stub"):
        exercises.check(name_of_first, space[name_of_first])
