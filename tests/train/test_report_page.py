"""The page of a run: what it says, of whole runs and of damaged ones, and that it asks nothing."""

import html.parser
import json
import shutil
import subprocess

import numpy as np
import pytest
import runs
from ml_collections import ConfigDict
from test_metrics import write_run

from jdecouple.inference import reports
from jdecouple.train import cli, presets, programs
from jdecouple.train import config as configuration
from jdecouple.train.commands import main
from jdecouple.train.metrics import MetricsWriter
from jdecouple.train.pages import again, answers, charts, page, report
from jdecouple.train.pages.record import read

EXITS = {"method__name": "early_exit", "method__projector": None, "epochs": 1}
EXITS |= {"checkpoint__every": 9, "data__synthetic_size": 200}
NOTHING = answers.Asked(evaluate=False)
HOSTILE = "</title><script>alert('x')</script><img src=http://x/y.png onerror=alert(1)>"
EMPTY = {"meta", "img", "path", "circle", "br"}
REQUESTS = {"src", "href", "srcset", "data", "action", "xlink:href", "poster"}


class Page(html.parser.HTMLParser):
    """What a browser would find in a page: tables by caption, texts, and what is wrong with it."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tables, self.notes, self.images = [], [], {}, [], []
        self._rows, self._caption = [], ""
        self.feed(text)
        assert not self.open

    @property
    def text(self):
        return " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") for name in given)
        for name in REQUESTS & given.keys():
            assert given[name].startswith(("data:image/png;base64,", "#part-")), given[name]
        assert "url(" not in given.get("style", "")
        if tag == "img":
            self.images.append(given["alt"])
        if tag == "svg" and "aria-hidden" not in given:
            assert given["role"] == "img"
            self.images.append(given["aria-label"])
        if tag == "tr":
            self._rows.append([])
        if tag == "th":
            assert given["scope"] in ("col", "row")
        if tag in ("th", "td"):
            self._rows[-1].append("")
        if tag == "table":
            self._rows = []
        if tag not in EMPTY:
            self.open.append((tag, given.get("class")))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop()[0] == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        if not self.open or self.open[-1][0] == "style":
            assert "@import" not in data
            assert "url(" not in data
            return
        tag, kind = self.open[-1]
        self.texts.append(data)
        if tag == "caption":
            self._caption = data
        elif tag in ("th", "td"):
            self._rows[-1][-1] += data
        elif kind == "note":
            self.notes.append(data)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Logging stays pytest's, and no folder of the user is used."""
    monkeypatch.setattr(cli, "log_in_short", lambda: None)
    monkeypatch.setattr(programs, "keep", lambda: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.copy(runs.finished_here(**EXITS), tmp_path_factory.mktemp("run"))


@pytest.fixture
def workdir(finished, tmp_path):
    return runs.copy(finished, tmp_path)


def rendered(workdir, asked=NOTHING):
    return Page(report.render(read(workdir), asked))


def edited(workdir, **changes):
    path = workdir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.slow
def test_the_command_writes_the_page_and_nothing_else(workdir, capsys):
    before = runs.fingerprint(workdir)
    main(["jdecouple", "report", str(workdir)])
    assert capsys.readouterr().out.strip() == str(workdir / "report.html")
    after = runs.fingerprint(workdir)
    assert after.keys() - before.keys() == {"report.html"}
    assert before.items() <= after.items()
    text = (workdir / "report.html").read_text()
    assert '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; ' in text
    found, lines = Page(text), runs.lines(workdir)
    last = lines[-1]
    assert f"{last['accuracy']:.2%}" in found.texts
    assert found.tables["Test accuracy"][1][:2] == ["exit 0", f"{last['exit_0/accuracy']:.2%}"]
    chosen = found.tables["Test accuracy, chosen three ways"]
    assert [row[0] for row in chosen] == [
        *("chosen by", "last step", "best validation", "best test (no result)"),
    ]
    assert chosen[1][1:] == [str(last["step"]), f"{last['accuracy']:.2%}"]
    measured = found.tables["Every exit on the test split"]
    assert [row[0] for row in measured[1:]] == ["exit 0", "exit 1"]
    confusion = found.tables["Examples by label (row) and prediction (column)"]
    assert sum(int(n) for row in confusion[1:] for n in row[1:]) == 50
    assert any(alt.startswith("The images of the highest losses") for alt in found.images)
    assert any(alt.startswith("Loss of each block, in training") for alt in found.images)
    assert any("rule cosine" in alt for alt in found.images)
    assert "No key has changed since the run began." in found.texts
    assert not found.notes


@pytest.mark.slow
def test_what_was_measured_before_is_taken(workdir, monkeypatch):
    main(["jdecouple", "evaluate", str(workdir), "--exit=0"])
    main(["jdecouple", "calibrate", str(workdir), "--split=test", "--cost=0.9"])
    monkeypatch.setattr(answers, "_computed", None)
    found = rendered(workdir, answers.Asked())
    assert "The confusions and the worst examples are those of exit 0." in found.text
    assert "calibrate chose the rule confidence" in found.text
    assert len(found.tables["Calibrated"]) == 3
    path = workdir / "evaluation_test" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 3}))
    found = rendered(workdir)
    assert "Every exit on the test split" not in found.tables  # of another checkpoint
    assert found.notes == ["The answers are not known: --noevaluate has left it out."]


def test_answers_of_another_network_at_the_same_step_are_not_shown(workdir):
    step = read(workdir).best_step
    logits, labels = np.zeros((2, 50, 10), np.float32), np.zeros(50, int)  # all of them right
    about = {"step": step, "split": "test"}
    reports.write_evaluation(workdir / "evaluation_test", logits, labels, about=about)
    (workdir / "exits.json").write_text(json.dumps({"step": step}))
    (workdir / "calibration_test").mkdir()
    curves = {"exits": [[0.5, 1.0], [1.0, 1.0]]}
    rows = [{"exit": i, "accuracy": 1.0} for i in range(2)]
    content = json.dumps({"curves": curves, "cost_name": "x", "exits": rows})
    (workdir / "calibration_test" / "calibration.json").write_text(content)
    found = rendered(workdir)
    assert found.notes == ["The answers are not known: --noevaluate has left it out."]
    assert "Every exit on the test split" not in found.tables
    assert not any(alt.startswith("Accuracy, by mean cost") for alt in found.images)


def test_data_that_are_gone_cost_no_page(workdir):
    content = json.loads((workdir / "config.json").read_text())
    content["config"]["data"]["name"] = "folder:/nowhere/pets"
    edited(workdir, **content)
    found = rendered(workdir, answers.Asked())
    (note,) = found.notes
    assert note.startswith("The answers are not known: ")
    assert "/nowhere/pets" in note
    assert "Test accuracy" in found.tables


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w: w.joinpath("metrics.jsonl").open("a").write('{"step": 9, "sp'), "1 damaged"),
        (lambda w: w.joinpath("metrics.jsonl").write_text(""), "has not been evaluated yet"),
        (lambda w: w.joinpath("config.json").write_text("{"), "config.json cannot be read"),
        (lambda w: w.joinpath("config.json").write_bytes(b"\xff"), "config.json cannot be read"),
        (lambda w: w.joinpath("config.json").unlink(), "config.json cannot be read"),
        (lambda w: edited(w, boundaries=[0, "a"]), "timeline"),
        (lambda w: edited(w, boundaries={}, devices=7), "boundaries, devices is damaged"),
        (lambda w: edited(w, parameters="9", device_kind=[]), "device_kind, parameters is damaged"),
        (lambda w: edited(w, total_steps=10**400, versions=[1]), "total_steps, versions is damage"),
        (lambda w: edited(w, config={"model": {"name": "mine"}}), "model.name is 'mine'"),
        (lambda w: edited(w, config={"model": 3, "data": HOSTILE}), "shown as it was written"),
        (lambda w: (w / "checkpoints_refused").mkdir(), "no longer sound"),
        (lambda w: (w / "timeline.png").mkdir(), ""),
    ],
)
def test_damage_is_told_and_the_page_is_there(workdir, damage, said):
    damage(workdir)
    assert said in " ".join(rendered(workdir).notes)


@pytest.mark.parametrize("kept", ["evaluation_test/evaluation", "calibration_test/calibration"])
def test_measurements_that_are_damaged(workdir, kept):
    step = read(workdir).best_step
    path = workdir / f"{kept}.json"
    path.parent.mkdir()
    names = ("exits", "classes", "worst", "confusion", "answers", "examples", "curves")
    path.write_text(json.dumps({name: [{}] for name in names} | {"step": step}))
    (path.parent / "exits.json").write_text(json.dumps({"step": step}))
    found = rendered(workdir)
    assert any(note.startswith("What was measured cannot be shown") for note in found.notes)


def test_numbers_that_no_chart_can_hold(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        for step, x in enumerate((1e308, -1e308, 5e-324, float("inf"))):
            writer.write(step, "train", {"loss": x, "block_0/loss": abs(x), "exit_x/accuracy": x})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10**400, "split": "train", "loss": 1}) + "\n")
        file.write(json.dumps({"step": 9, "split": "test", f"exit_{'9' * 5000}/loss": 1}) + "\n")
    found = rendered(tmp_path)
    assert "1 damaged or half-written line(s) of metrics.jsonl are left out." in found.notes


def test_lost_checkpoints_and_lines(workdir):
    shutil.rmtree(workdir / "checkpoints")
    found = rendered(workdir)
    assert "finished" in found.texts
    assert f"{runs.lines(workdir)[-1]['accuracy']:.2%}" in found.texts


def test_lost_lines_leave_no_best_step(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[5:]))
    found = rendered(workdir)
    assert "metrics.jsonl has lost 5 line(s): the best steps are not known." in found.notes
    assert len(found.tables["Test accuracy, chosen three ways"]) == 2


def test_a_run_that_is_not_finished_has_no_result_yet(workdir):
    edited(workdir, total_steps=999)
    found = rendered(workdir)
    assert "not finished" in found.texts
    assert report._UNFINISHED in found.notes


def test_a_run_that_diverged(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, "train", {"loss": 2.0, "block_0/loss": 2.0})
        writer.write(2, "train", {"loss": float("nan"), "block_0/loss": float("inf")})
    assert any("no longer sound at step 2" in note for note in rendered(tmp_path).notes)


def test_what_users_name_is_text(workdir):
    content = json.loads((workdir / "config.json").read_text())
    content["config"]["data"]["data_dir"] = HOSTILE
    content["device_kind"], content["devices"] = HOSTILE, [[HOSTILE]]
    content["history"] = [{"step": 3, "key": HOSTILE, "old": HOSTILE, "new": [1]}]
    edited(workdir, **content)
    (workdir / "metrics.jsonl").unlink()  # else other answers than these are expected
    logits = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
    names = [HOSTILE, "\x1b[31m \u202eb", "\ud800"]
    reports.write_evaluation(
        *(workdir / "evaluation_test", logits, np.arange(9) % 3),
        class_names=names,
        about={"step": read(workdir).best_step},
    )
    moved = workdir.rename(workdir.with_name("<b>'\"& \udcff"))
    page_text = report.render(read(moved), NOTHING)
    page_text.encode()
    found = Page(page_text)
    assert found.tables["Keys that changed on the way: each from its step on"][1] == [
        *("3", HOSTILE, HOSTILE, "(1,)"),
    ]
    assert found.tables["Precision, recall and F1"][1][0] == HOSTILE
    assert found.tables["Precision, recall and F1"][2][0] == r"\x1b[31m \u202eb"
    assert found.tables["Stages"][1][2] == HOSTILE


def test_a_hundred_classes(workdir):
    (workdir / "metrics.jsonl").unlink()
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 400, 100)).astype(np.float32)
    labels = generator.integers(0, 100, 400)
    about = {"step": read(workdir).best_step}
    reports.write_evaluation(workdir / "evaluation_test", logits, labels, about=about)
    found = rendered(workdir)
    assert "Confusion matrix of 100 classes: labels down, predictions across." in found.images
    counts = [
        int(row[2]) for row in found.tables["What is most often taken for something else"][1:]
    ]
    assert counts == sorted(counts, reverse=True)
    assert len(counts) == 20
    assert len(found.tables["Precision, recall and F1"]) == 101


def test_many_blocks_and_any_metric(tmp_path):
    write_run(tmp_path, 54, 40)
    with MetricsWriter(tmp_path, resume_step=40) as writer:
        writer.write(41, "train", {"loss": 1.0, "learning_rate": 0.5, "block_53/mine/too": 2.0})
    text = report.render(read(tmp_path), NOTHING)
    found = Page(text)
    said = next(x for x in found.images if x.startswith("Loss of each block, in training"))
    assert said.startswith("Loss of each block, in training, by step. 54 lines; block 0: from 1 to")
    assert any(x.startswith("Learning rate, in training") for x in found.images)
    assert any(x.startswith("Mine, too of each block, in training") for x in found.images)
    assert any(x.startswith("Test accuracy by depth") for x in found.images)
    assert len(text) < 400_000


def test_a_long_curve_keeps_its_peaks():
    ys = np.ones(50_000)
    ys[12_345], ys[30_000] = 9.0, np.nan
    curve = charts.Curve("loss", range(50_000), ys, charts.depths(1)[0])
    drawn = charts.Chart("Loss", [curve]).html()
    assert len(drawn) < 200_000
    assert drawn.count("M") > 2  # the gap
    kept = charts.thinned(curve, 500)
    assert max(y for _, y in kept if y == y) == 9.0
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


@pytest.mark.parametrize(
    ("base", "values"),
    [
        ("quickstart", {}),
        ("vision:cifar10,resnet20,dgl,2", {"epochs": 7, "mesh.replicas": (2, 1)}),
        ("delayed:cifar10,resnet56,bp@fr,2", {"method.name": "fr", "remat": "blocks"}),
        ("text", {"data.name": "csv:/a b/it's, $HOME;rm", "data.text_columns": ("a", "b c")}),
        ("equal:digits,mlp,scpl", {"optimizer.name": "optax:lion", "optimizer.b1": 0.8}),
        ("quickstart", {"growth.blocks": (1, 3), "growth.epochs": (0.0, 0.5), "ema": 0.99}),
    ],
)
def test_the_command_makes_the_same_configuration(base, values):
    wanted = presets.load(base, values)
    written = ConfigDict(json.loads(json.dumps(wanted.to_dict())))  # as config.json has it
    found = again.command(configuration.filled(written), "runs/x y")
    program, name, *arguments = shell_words(again.spelt(found))
    config, workdir = cli.parse([f"{program} {name}", *arguments])
    assert (program, name, workdir) == ("jdecouple", "train", "runs/x y")
    assert config.to_dict() == configuration.filled(wanted).to_dict()


def shell_words(text):
    """What a shell makes of a command."""
    spelt = subprocess.run(
        ["sh", "-c", f'jdecouple() {{ printf "%s\\0" jdecouple "$@"; }}; {text}'],
        capture_output=True,
        check=True,
        text=True,
    )
    return spelt.stdout.split("\0")[:-1]


def test_what_no_command_line_can_say_is_told(workdir):
    content = json.loads((workdir / "config.json").read_text())
    content["config"]["data"]["data_dir"] = "/a\nb"  # as no page shows it exactly
    edited(workdir, **content)
    found = rendered(workdir)
    assert any(note.startswith("No command line says this configuration") for note in found.notes)


def test_a_schedule_is_drawn_where_nothing_was_measured(workdir):
    edited(workdir, boundaries=[0, 1], devices=[["cpu:0"], ["cpu:1"]])
    found = rendered(workdir)
    assert found.tables["Stages"][1:] == [["0", "0", "cpu:0"], ["1", "1", "cpu:1"]]
    assert any(alt.endswith("under schedule sequential, simulated.") for alt in found.images)
    assert any(text.startswith("stage 0 | F0") for text in found.texts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{empty}"], "there is no run in '"),
        (["{empty}/none"], "there is no run in '"),
        (["ftp://b/run"], "is no folder: one of this machine, or gs://"),
        (["{run}", "--output={run}/metrics.jsonl"], "is no page"),
        (["{run}", "--output={empty}/no/page.html"], "its folder does not exist"),
        (["{run}", "--step=7"], "--step 7: best and last are allowed, and 9, 18, 22"),
        (["{run}", "--step=first"], "--step first: best and last are allowed"),
        (["{run}", "--batch_size=0"], "batch_size is 0"),
        (["{run}", "--spilt=test"], "did you mean '--split'?"),
        ([], "WORKDIR"),
    ],
)
def test_bad_arguments_are_one_line(finished, tmp_path, capsys, arguments, said):
    before = runs.fingerprint(finished)
    given = [argument.format(empty=tmp_path, run=finished) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["jdecouple", "report", *given])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert runs.fingerprint(finished) == before


def test_pieces_are_escaped():
    pieces = [
        *(page.Text(HOSTILE), page.Note(HOSTILE), page.Code(HOSTILE, HOSTILE)),
        *(page.Headline(HOSTILE, HOSTILE), page.Facts([(HOSTILE, HOSTILE)])),
        page.Table(HOSTILE, [HOSTILE, "n"], [[HOSTILE, None]]),
        page.Picture(b"png", HOSTILE, HOSTILE),
        page.Fold(HOSTILE, [page.Grid([page.Drawing("<svg aria-hidden></svg>", HOSTILE)])]),
        charts.Chart(HOSTILE, [charts.Curve(HOSTILE, [1], [2], "red")], HOSTILE),
    ]
    found = Page(page.render(HOSTILE, [page.Section(HOSTILE, pieces), page.Section("none", [])]))
    assert found.tables[HOSTILE] == [[HOSTILE, "n"], [HOSTILE, ""]]
    assert found.texts.count(HOSTILE) >= 12
    assert "none" not in found.texts


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"growth__blocks": (1, 2), "growth__steps": (0, 10)},
        {"method__name": "bp", "method__projector": None, "mesh__stages": 2, "microbatches": 4},
        {"method__name": "fdg", "method__projector": None, "mesh__stages": 2, "profile": 4},
        EXITS | {"data__num_classes": 100, "data__synthetic_size": 2000},
    ],
)
def test_pages_of_real_runs(values, tmp_path):
    workdir = runs.copy(runs.finished_here(**values), tmp_path)
    found = rendered(workdir, answers.Asked())
    assert not found.notes
    assert ("profile" in values) == ("Measured with config.profile." in found.texts)
