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
from conftest import ROOT

import pdpo
from pdpo import exercises
from pdpo.exercises import core

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
    assert min(map(len, LOOKALIKES.values())) >= 4 and sum(map(len, LOOKALIKES.values())) >= 100


@every_task
def test_each_look_alike_is_rejected_in_words_of_its_own(name, any_precision, monkeypatch):
    causes = {words: cause(verdict(name, function)) for words, function in LOOKALIKES[name].items()}
    assert {words: found for words, found in causes.items() if words not in found} == {}
    assert len(set(causes.values())) == len(causes)
    monkeypatch.setattr(core, "_PACKAGE", "nowhere")  # the package's mistakes, too, play the student
    found = [(cause(verdict(name, mistake)), diagnosis) for diagnosis, mistake in TASKS[name].mistakes]
    assert [said for said, diagnosis in found if said != diagnosis] == []


@every_task
def test_a_right_answer_of_another_form_passes_every_time(name, any_precision, capsys):
    for _ in range(5):
        exercises.check(name, SECOND[name])
    assert capsys.readouterr().out == f"{name}: passed\n" * 5


def raising(error):
    def function(*_):
        raise error

    return function


@every_task
def test_stubs_crashes_nothing_constants_and_calls_of_the_package_are_never_passed(name):
    results = []

    def right(*arguments):
        results.append(SECOND[name](*arguments))
        return results[-1]

    def cheating(*arguments):
        pdpo.bradley_terry_logps(torch.zeros(1), torch.zeros(1))
        return SECOND[name](*arguments)

    exercises.check(name, right)
    for function, words in [
        (raising(SystemExit(0)), "SystemExit"),
        (raising(core.Wrong("nothing", "nothing is wrong")), "it raised Wrong"),
        (raising(NotImplementedError("Your turn")), "still a stub (Your turn)"),
        (lambda *_: None, "got NoneType"),
        (lambda: 0, "TypeError"),
        (lambda *_: results[0], ""),
        (lambda *x: right(*x) if len(results) < 2 else {}["broken"], "KeyError"),
        (cheating, "pdpo.preferences.bradley_terry_logps"),
    ]:
        assert words in cause(verdict(name, function))
        del results[1:]


GIVEN_NO_TENSOR = {"frozen_reference", "clip_gradients", "symptoms", "planted_bug"}


@pytest.mark.parametrize("name", [name for name in TASKS if name not in GIVEN_NO_TENSOR])
def test_inputs_may_not_be_changed_in_place(name):
    def function(*arguments):
        result = SECOND[name](*arguments)
        tensor = next(each for each in arguments if isinstance(each, torch.Tensor))
        tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)
        return result

    assert "in place" in cause(verdict(name, function))


@every_task
def test_copies_of_right_values_do_not_pass(name):
    """A function that knows every answer of one check, and no other, fails in the next one."""
    seen = set()

    def recall(*arguments):
        parameters = [list(each.parameters()) for each in arguments if isinstance(each, torch.nn.Module)]
        gradients = [x.grad for each in arguments if isinstance(each, list) for x in each]
        key = repr((arguments, parameters, gradients))
        if not recalling:
            seen.add(key)
        return SECOND[name](*arguments) if key in seen else None

    recalling = False
    exercises.check(name, recall)
    recalling = True
    verdict(name, recall)


def every_other_time(function):
    """Only where gradients are looked at: each input is given once for the value, then once for its gradient."""
    turns = []
    return lambda *arguments: turns.append(1) or (SECOND["plackett_luce"] if len(turns) % 2 else function)(*arguments)


@pytest.mark.parametrize(
    "wrap", [lambda f: f, functools.partial, lambda f: lambda *x: f(*x), functools.lru_cache, every_other_time]
)
def test_the_packages_own_function_is_refused_however_it_is_wrapped(wrap):
    said = cause(verdict("plackett_luce", wrap(pdpo.plackett_luce_logps)))
    assert "calls pdpo.preferences.plackett_luce_logps, which is the answer" in said


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


def test_hints_are_three_and_come_one_after_the_other(capsys):
    for task in TASKS.values():
        assert len(set(task.hints)) == 3 and all(len(each) > 20 for each in task.hints)
    exercises._hints_shown.clear()
    for _ in range(4):
        exercises.hint("dpo_loss")
    first, second, third, again = capsys.readouterr().out.splitlines()
    assert first.startswith("dpo_loss, hint 1 of 3: ") and " 2 of 3: " in second and " 3 of 3: " in third == again


def test_progress_tells_what_was_passed_and_forgets_what_no_longer_is(capsys):
    exercises._passed.clear()
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
        (lambda: exercises.hint("xx"), "There are: "),
        (lambda: exercises.check("plackett_luce", torch.zeros(2)), "expected a function, got Tensor"),
    ],
)
def test_bad_input_raises_a_value_error_that_says_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_importing_the_exercises_takes_no_library_that_is_slow_to_load(output):
    code = "import sys, pdpo.exercises; pdpo.exercises.tasks(); print({'transformers', 'matplotlib', 'scipy'} & {*sys.modules})"
    assert output("-c", code) == "set()\n"


# The notebooks

SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("ex_*.ipynb"))
EXERCISES = ROOT / "notebooks" / "exercises"
make_exercises = runpy.run_path(str(ROOT / "notebooks" / "make_exercises.py"))
every_notebook = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)


def sources(path, kind):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_the_exercises_are_made_from_the_solutions_as_they_are():
    assert {path.name for path in EXERCISES.glob("*.ipynb")} == {path.name for path in SOLUTIONS}
    for path in SOLUTIONS:
        made = nbformat.writes(make_exercises["exercise"](nbformat.read(path, as_version=4))) + "\n"
        assert (EXERCISES / path.name).read_text(encoding="utf-8") == made, f"{path.name}: run `make exercises`"


@every_notebook
def test_a_solution_is_a_whole_guided_path(path):
    code, prose = sources(path, "code"), "\n".join(sources(path, "markdown"))
    header = "| difficulty | importance | minutes | follows |"
    for needed in (header, "**Solved.**", "*Predict", "**Write**", "**Explain", "**Takeaways**"):
        assert needed in prose, needed
    mine = [task for task in TASKS.values() if task.exercise == path.stem[:5]]
    assert mine
    for task in mine:
        assert f"<!-- hints: {task.name} -->" in prose and f'check("{task.name}", {task.name})' in "\n".join(code)
        (written,) = [cell for cell in code if f"def {task.name}(" in cell]
        on_one_line = re.sub(r"\s+", " ", written).replace("( ", "(").replace(", )", ")")
        assert task.signature in on_one_line and "# solution" in written


@every_notebook
def test_an_untouched_exercise_holds_no_solution_runs_to_its_first_stub_and_says_what_to_do(path):
    text, code = (EXERCISES / path.name).read_text(encoding="utf-8"), sources(EXERCISES / path.name, "code")
    assert not re.search(r"# solution|# end\b|\*\*Solved\.\*\*|/notebooks/solutions/", text)
    first = next(re.search(r"write (\w+), run", cell)[1] for cell in code if "raise NotImplementedError" in cell)
    space, dtype = {"__name__": "__main__"}, torch.get_default_dtype()
    try:
        with pytest.raises(NotImplementedError, match=rf"Your turn: write {first}, .*hint\('{first}'\)"):
            for cell in code:
                exec(re.sub(r"^( *)%pip.*", r"\1pass", cell, flags=re.MULTILINE), space)
    finally:
        torch.set_default_dtype(dtype)
