"""A stage's key: a change of code that matters makes the stage anew, any other one leaves it where it was."""

import ast
import functools

import pytest

from pdpo import experiments, reach
from pdpo.experiments import run_preference, run_reward_model, run_sft
from pdpo.reach import SOURCES, Package, version

STAGES = ("sft", "preference", "reward_model", "win_rate")


def changed(module: str, old: str, new: str) -> dict[str, str]:
    """The package's sources with one change."""
    assert old in SOURCES[module], f"{module} has no {old!r} any more: change something else"
    return SOURCES | {module: SOURCES[module].replace(old, new)}


def versions(sources: dict[str, str]) -> dict[str, str]:
    """Each kind of stage's hash."""
    package = Package(sources)
    return {
        stage: version(package.reached(package.definition("experiments", f"run_{stage}.<locals>.build"))) for stage in STAGES
    }


@pytest.fixture(scope="module")
def now():
    return versions(SOURCES)


@pytest.mark.parametrize(
    "redone, module, old, new",
    [
        ("sft preference", "training", "ORACLE_ALPHA = ", "ORACLE_ALPHA = 2 * "),
        ("sft preference reward_model win_rate", "models", "super().forward(hidden.float())", "super().forward(hidden)"),
        ("sft preference reward_model", "encoding", "TEMPLATE = ", 'TEMPLATE = "" + '),
        ("reward_model", "making", ".diff(dim=1).neg()", ".diff(dim=1)"),
        ("sft preference reward_model", "preferences", "import logsigmoid", "import softplus as logsigmoid"),
        ("win_rate", "experiments", "record.responses[-1] for", "record.responses[1] for"),
        ("win_rate", "models", "normalize_embeddings=True", "normalize_embeddings=False"),
        ("win_rate", "toy", '"courteous": ', '"courteous": 1 + '),
        ("preference win_rate", "evaluation", "(p.exp() * (p - q))", "(q.exp() * (p - q))"),
    ],
)  # fmt: skip
def test_what_matters_makes_a_stage_anew(now, redone, module, old, new):
    then = versions(changed(module, old, new))
    assert {stage for stage in STAGES if then[stage] != now[stage]} >= set(redone.split())
    if redone in ("reward_model", "win_rate"):  # ... and no other one
        assert [stage for stage in STAGES if then[stage] != now[stage]] == [redone]


def moved() -> dict[str, str]:
    """batch_indices, which training needs, stands in a file of its own."""
    tree = ast.parse(SOURCES["training"])
    (function,) = (node for node in tree.body if getattr(node, "name", "") == "batch_indices")
    tree.body.remove(function)
    source = "from pdpo.shuffling import batch_indices\n" + ast.unparse(tree)
    return SOURCES | {"training": source, "shuffling": "import torch\n" + ast.unparse(function)}


UNSEEN = {
    "a comment": changed("training", "    scaler.update()", "    # and on\n    scaler.update()"),
    "a docstring": changed("losses", "Negative log-likelihood", "The negative log-likelihood"),
    "layout": SOURCES | {module: ast.unparse(ast.parse(source)) for module, source in SOURCES.items()},
    "an annotation": changed("sampling", "temperature: float", "temperature: int | float"),
    "the text of an error": changed("encoding", "expected", "wanted"),
    "a part of the text of an error": changed("encoding", "Responses are never cut", "No response is cut"),
    "the text of a print": changed("training", "runs on padded batches", "is run on padded batches"),
    "plots": changed("plots", "def ", "def _"),
    "what a bar is called": changed("evaluation", '"features of the reward model"', '"features"'),
    "what a preset holds": changed("presets", "0.3, 0.7, 1.0)", "0.3, 0.8, 1.0)"),
    "another loss": changed("losses", "def ppo_loss(", "def ppo_loss_2("),
    "what a notebook alone calls": changed("experiments", "if len(found) > 1}", "if len(found) > 2}"),
    "a definition in another file": moved(),
}  # fmt: skip


@pytest.mark.parametrize("change", UNSEEN)
def test_what_does_not_matter_leaves_every_stage(now, change):
    assert UNSEEN[change] != SOURCES and versions(UNSEEN[change]) == now


# how names are followed


def of(*sources: str) -> str:
    """The hash of the function f of module a, of the modules a, b and c of a package p."""
    package = Package(dict(zip("abc", sources, strict=False)), name="p")
    return version(package.reached(package.definition("a", "f")))


G, IN_C = "def g(): return 1", "class C:\n    "
LINKS = {  # what f of the first module reaches holds a 1
    "an annotated constant": ["X: int = 1\ndef f(): return X"],
    "a constant made of another": ["Y = 1\nX = Y\ndef f(): return X"],
    "a constant that is altered": ["X = [3]\nX[0] = 1\ndef f(): return X"],
    "one that a call alters": ["X = {}\nX.update(a=1)\ndef f(): return X"],
    "a definition under a condition": ["import os\nif os.name:\n    X = 1\ndef f(): return X"],
    "a default": ["X = 1\ndef f(x=X): return x"],
    "a function handed on": [G + "\ndef f(): return map(g, ())"],
    "a decorator": ["def g(h): return 1\n@g\ndef f(): return 0"],
    "one under another name": ["from p.b import g as h\ndef f(): return h()", G],
    "imported from where it is imported": ["from p.b import g\ndef f(): return g()", "from p.c import g", G],
    "module.function within": ["def f():\n    from p import b\n    return b.g()", G],
    "module.constant": ["from p import b as m\ndef f(): return m.X", "X = 1"],
    "what a method uses": ["def f(x): return x.m()", "X = 1\n" + IN_C + "def m(self): return X"],
    "a class's constant": ["def f(x): return x.K", IN_C + "K = 1"],
    "a method that a library calls": ["from p.b import C\ndef f(): return C()", IN_C + "def forward(self): return 1"],
    "a class's parent": ["class B:\n    def g(self): return 1\nclass C(B): ...\ndef f(): return C()"],
    "a library's function within": ["def f():\n    from numpy import log10 as log\n    return log(3)"],
    "a function of a module, imported within under another name": ["def f():\n    from p.b import g as h\n    return h()", G],
    "what a progress bar goes over": ["def f(): return progress([1])"],
}


@pytest.mark.parametrize("link", LINKS)
def test_names_are_followed_through(link):
    assert of(*[source.replace("1", "2") for source in LINKS[link]]) != of(*LINKS[link])


def test_names_exchanged_are_seen_those_marked_are_not_followed_and_an_import_within_may_move():
    two = "from p.b import {} as x, {} as y\ndef f(): return x() - y()", "def g(): ...\ndef h(): ..."
    assert of(two[0].format("g", "h"), two[1]) != of(two[0].format("h", "g"), two[1])
    marked = "X = 1\n@in_key\ndef g(): return X\ndef f(): return g()"
    assert of(marked.replace("1", "2")) == of(marked)
    within = "def f():\n    from p.b import g\n    return g()"
    assert of(within.replace("p.b", "p.c"), "", G) == of(within, G)
    assert of("def f():\n    import os\n    return os.name") == of("import os\ndef f(): return os.name")
    assert of("def f():\n    from p.b import g\n    return g()", G) == of("from p.b import g\ndef f(): return g()", G)


def test_files_that_change_between_two_imports_are_refused(python):
    code = "from pdpo import reach; reach.SOURCES['losses'] += '# edited'; import pdpo.experiments"
    _, err = python("-c", code).communicate()
    assert "its files have changed since this process first imported it" in err.splitlines()[-1]


def test_the_package_imports_from_itself_in_the_ways_that_are_followed():
    for module, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.split(".")[0] == "pdpo"], module
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and "*" not in [alias.name for alias in node.names], module
                assert node.module != "pdpo" or all(alias.name in SOURCES for alias in node.names), module


# end to end: each kind of stage


@pytest.fixture
def with_sources(monkeypatch):
    """Gives the stages other sources to be keyed by, as a new process would find them."""

    def put(sources: dict[str, str]) -> None:
        monkeypatch.setattr(reach, "SOURCES", sources)
        reach._package.cache_clear(), reach.code_version_of.cache_clear()

    yield put
    put(SOURCES)


def test_each_kind_of_stage_is_redone_after_a_change_that_matters_and_found_after_one_that_does_not(quick, with_sources):
    sft = run_sft(quick)
    dpo = functools.partial(run_preference, sft, method="dpo", beta=0.1)
    win_rate = functools.partial(experiments.run_win_rate, dpo())
    for run, does_not, *matters in [
        (lambda: run_sft(quick), "a docstring", "losses", "return -policy_logps", "return -2 * policy_logps"),
        (dpo, "a definition in another file", "sampling", "temperature == 0", "temperature < 0.1"),
        (lambda: run_reward_model(sft), "layout", "evaluation", "weight_decay * weights", "2 * weight_decay * weights"),
        (win_rate, "plots", "evaluation", "TIE = 1e-6", "TIE = 1e-2"),
    ]:
        first = run().path
        with_sources(UNSEEN[does_not])
        assert run().path == first
        with_sources(changed(*matters))
        assert run().path != first
        with_sources(SOURCES)
        assert run().path == first


def test_the_references_logps_that_runs_share_are_redone_with_their_code(quick, with_sources):
    sft = run_sft(quick)
    run_preference(sft, method="dpo", beta=0.1)
    files = set(sft.path.parent.glob("*-reference-*"))
    with_sources(changed("training", "with_reference_logps(reference, rows", "with_reference_logps(other, rows"))
    run_preference(sft, method="dpo", beta=0.1)
    assert len(files) == 2 and len(set(sft.path.parent.glob("*-reference-*")) - files) == 2
