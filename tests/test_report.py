"""The page that `train --out` leaves and the card of a trained policy: whole, escaped, in the model hub's format."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

from huggingface_hub import ModelCard

from pdpo import report, saved
from pdpo.encoding import TEMPLATE
from pdpo.experiments import run_preference, run_sft, run_win_rate

EVIL = "<script>alert('x')</script> & more"


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.names, self.sources = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]


def test_the_page_needs_nothing_else_and_shows_a_files_text_as_text(quick, tmp_path):
    rows = json.loads(open(quick.data).read())
    file = tmp_path / "evil.json"
    file.write_text(
        json.dumps(
            [
                row | {"prompt": f"{EVIL} {row['prompt']}", "responses": [f"{EVIL} {text}" for text in row["responses"]]}
                for row in rows
            ]
        )
    )
    sft = run_sft(replace(quick, data=str(file), context=200))
    runs = [sft, run_preference(sft, method="dpo", beta=0.1, steps=2), run_preference(sft, method="drdo", steps=2)]
    measured = [run_win_rate(run) for run in runs]
    page = report.report(measured, {"rows": 60, EVIL: 1}, 7)
    found = Tags(page)
    assert "script" not in found.names and page.count("&lt;script&gt;") >= 7 and "http" not in page
    assert len(found.sources) == 3 and all(each.startswith("data:image/png;base64,") for each in found.sources)
    for text in (
        "DPO, beta 0.1 and DRDO",
        "7 held-out prompts",
        "began at random weights",
        "batch_size",
        str(sft.train.lr),
        "<td>60</td>",
    ):
        assert text in page
    assert json.loads((sft.path / "stage.json").read_text())["config"]["data"] in page


def test_the_card_is_one_that_the_hub_reads_and_a_copied_run_holds_it(quick, tmp_path):
    sft = run_sft(quick)
    run = run_preference(sft, method="odpo", beta=0.3, steps=2)
    for model, base in ((None, None), ("a/model", "a/model"), (str(tmp_path), None)):
        text = saved.model_card(replace(run, preset=replace(quick, model=model)))
        data = ModelCard(text).data
        assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "text-generation", base)
        assert data.tags == ["pdpo", "sft", "odpo"] and str(tmp_path) not in text
        assert ("random weights" in text) == (model is None) and "- beta: 0.3" in text and TEMPLATE in text
        assert re.search("sha256 .*`[0-9a-f]{64}`", text)
    assert (saved.copy_run(sft, tmp_path / "out") / "README.md").read_text() == saved.model_card(sft)
