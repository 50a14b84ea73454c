"""`train` and launch/train.py in one process: a good run's files, and every kind of bad input."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import pytest
import yaml
from tensorflow.python.framework import config as tf_config

from launch.train import main
from orchestrator import SettingError, config, runtime, storage
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.parts import imported
from orchestrator.runtime import Runtime
from orchestrator.training import check_batch
from tests.fakes import FakeCommunicator

ROOT = Path(__file__).resolve().parents[1]

FACTORIES = """
import keras, numpy as np, tensorflow as tf

CALLS = []


def data(global_batch_size, seed, rows=24, batched=True, validate=True):
    CALLS.append(("data", global_batch_size, seed, rows))
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype("float32")
    y = x.sum(1, keepdims=True)
    whole = tf.data.Dataset.from_tensor_slices((x, y))
    if batched:
        whole = whole.batch(global_batch_size)
    return whole, (whole if validate else None)


def arrays(global_batch_size, seed):
    x = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
    return (x, x.sum(1, keepdims=True)), (x[:5], x[:5].sum(1, keepdims=True))


def one(global_batch_size, seed):
    return data(global_batch_size, seed)[0]


def model(rate=0.01, path=None, key=None, function=None, seeded=None):
    CALLS.append(("model", rate))
    start = keras.initializers.GlorotUniform(seed=seeded)
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer=start)])
    net.compile(keras.optimizers.Adam(rate), "mse", metrics=["mae"])
    return net


def uncompiled():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


def nothing():
    return None


def failing():
    raise RuntimeError("the factory is broken")


NUMBER = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a user's module and settings; `init` may be called in it."""
    (tmp_path / "mine.py").write_text(FACTORIES)
    settings = {
        "run": {"dir": str(tmp_path / "run"), "seed": 3, "backend": "single"},
        "train": {"epochs": 2, "global_batch_size": 8},
        "data": {"factory": "mine:data"},
        "model": {"factory": "mine:model"},
        "callbacks": [
            {"ModelCheckpoint": {"filepath": "best.keras", "save_best_only": True}},
            {"EarlyStopping": {"patience": 1, "restore_best_weights": True}},
            {"ReduceLROnPlateau": {"patience": 3}},
        ],
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)

    def abort(self, code):
        raise AssertionError(f"abort({code}): an error that is not a SettingError, see its output")

    monkeypatch.setattr(SingleCommunicator, "abort", abort)
    sys.modules.pop("mine", None)
    yield tmp_path
    runtime.current().close()
    tf_config.disable_op_determinism()  # of run.deterministic: later tests draw without a seed
    sys.modules.pop("mine", None)
    sys.path[:] = [p for p in sys.path if p != str(tmp_path)]


def launch(*words: str) -> int:
    return main(["--config", "settings.yaml", *words])


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_good_run(here, capsys):
    assert launch("model.options={rate: 0.1}", "data.options.rows=20") == 0
    run = here / "run"
    assert sorted(os.listdir(run)) == [
        "best.keras",
        "checkpoints",
        "config.yaml",
        "events.jsonl",
        "history.csv",
        "outcome.json",
    ]
    mine = importlib.import_module("mine")
    assert mine.CALLS == [("data", 8, 3, 20), ("model", 0.1)]
    # the settings as they were, overrides and defaults in them, and readable again
    settings = config.load(run / "config.yaml")
    assert settings.model.options == {"rate": 0.1}
    assert settings.train.gradient_buckets == 1
    with open(run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"loss", "mae", "val_loss", "val_mae", "learning_rate"} < set(rows[0])
    assert float(rows[1]["val_loss"]) < float(rows[0]["val_loss"])
    happened = events(run)
    saved = [e for e in happened if "state" in e]  # from the writer's thread, at any time
    assert [(e["kind"], e["step"]) for e in saved] == [("checkpoint", 3), ("checkpoint", 6)]
    happened = [e for e in happened if "state" not in e]
    assert [e["kind"] for e in happened] == [
        "start",
        "checkpoint",
        "best",
        "checkpoint",
        "best",
        "restore",
        "end",
    ]
    assert happened[0]["backend"] == "single"
    assert (happened[0]["ranks"], happened[0]["seed"], happened[0]["step"]) == (1, 3, 0)
    assert [e["epoch"] for e in happened] == [None, 0, 0, 1, 1, 1, 1]
    assert [e["step"] for e in happened] == [0, 3, 3, 6, 6, 6, 6]
    assert happened[1]["path"] == str(run / "best.keras")
    assert happened[4]["value"] == float(rows[1]["val_loss"])
    assert {e["rank"] for e in happened} == {0}
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome == {"exit_code": 0, "reason": "finished", "epoch": 1, "step": 6}
    loaded = keras.models.load_model(run / "best.keras")
    assert type(loaded.optimizer) is keras.optimizers.Adam
    out, _ = capsys.readouterr()
    assert "Training on one process: 8 samples a step" in out
    assert "Done after 2 epochs, 6 steps; the weights are those of epoch 2" in out
    assert str(run) in out.splitlines()[-1]


def test_a_second_run_replaces_the_first_ones_records(here):
    assert launch("checkpoint={every_epochs: null}") == 0
    runtime.current().close()
    words = ("train.epochs=1", "data.options.validate=false", "callbacks=[]")
    assert launch(*words, "run.resume=never") == 0
    assert [e["kind"] for e in events(here / "run")] == ["start", "checkpoint", "end"]
    assert json.loads((here / "run/outcome.json").read_text())["epoch"] == 0
    assert len((here / "run/history.csv").read_text().splitlines()) == 2


def test_the_run_directory_may_be_anywhere(here):
    assert launch("run.dir=memory://runs/training") == 0
    fs, path = storage.resolve("memory://runs/training")
    try:
        assert {os.path.basename(p) for p in fs.ls(path, detail=False)} == {
            "best.keras",
            "checkpoints",
            "config.yaml",
            "events.jsonl",
            "history.csv",
            "outcome.json",
        }
    finally:
        fs.rm("/runs", recursive=True)


def test_the_same_seed_gives_the_same_run(here):
    digests = []
    for number, seed in enumerate((5, 5, 6)):
        assert launch(f"run.seed={seed}", f"run.dir=run{number}") == 0
        digests.append(events(here / f"run{number}")[-1]["weights"])
        runtime.current().close()
    assert digests[0] == digests[1] != digests[2]


RUN = ("train.epochs=4", "run.seed=4", "run.deterministic=true")


def record(run):
    """What a run has come to: its weights, its history, its decisions."""
    decided = [
        {key: value for key, value in event.items() if key not in ("time", "path")}
        for event in events(run)
        if event["kind"] not in ("start", "resume", "preempt") and "state" not in event
    ]
    return (run / "history.csv").read_text(), decided


def again(*words):
    runtime.current().close()
    return launch(*words)


def test_more_epochs_go_on_from_the_last(here, capsys):
    assert launch(*RUN, "run.dir=whole") == 0
    assert again(*RUN, "run.dir=parts", "train.epochs=2") == 0
    capsys.readouterr()
    assert again(*RUN, "run.dir=parts") == 0
    out, _ = capsys.readouterr()
    assert "Changed since the run was begun: train.epochs: 2 before, 4 now" in out
    assert "Continuing at epoch 3 (step 6) from parts/checkpoints/step-0000000006" in out
    whole, parts = record(here / "whole"), record(here / "parts")
    assert parts[0] == whole[0]
    ended = [event for event in parts[1] if event["kind"] in ("restore", "end")]
    assert [event for event in whole[1] if event["kind"] in ("restore", "end")] == ended
    (resumed,) = [event for event in events(here / "parts") if event["kind"] == "resume"]
    assert (resumed["epoch"], resumed["batch"], resumed["step"]) == (2, 0, 6)


def test_a_run_that_has_ended_ends_again(here, capsys):
    assert launch(*RUN) == 0
    first = record(here / "run")
    assert again(*RUN) == 0
    assert "Training ended before, after 4 epochs (12 steps)" in capsys.readouterr().out
    assert record(here / "run") == first


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.seed=5", "run.seed: 4 before, 5 now"),
        ("train.global_batch_size=4", "train.global_batch_size: 8 before, 4 now"),
        ("data.options.rows=16", "data.options.rows: None before, 16 now"),
        ("model.options.rate=0.5", "model.options.rate: None before, 0.5 now"),
    ],
)
def test_settings_that_make_another_training(here, capsys, word, message):
    assert launch(*RUN) == 0
    first, settings = record(here / "run"), (here / "run/config.yaml").read_text()
    assert again(*RUN, word) == 2
    said = message_of(capsys)
    assert message in said
    assert "run.resume=never" in said
    assert record(here / "run") == first
    assert (here / "run/config.yaml").read_text() == settings
    outcome = json.loads((here / "run/outcome.json").read_text())
    assert (outcome["exit_code"], outcome["epoch"]) == (2, None), "of this start, not of the first"
    assert message in outcome["reason"]


def test_never(here, capsys):
    assert launch(*RUN) == 0
    first = record(here / "run")
    assert again(*RUN, "run.resume=never") == 2
    assert "holds 3 checkpoints already, the newest of step 12" in message_of(capsys)
    assert record(here / "run") == first


def test_a_given_checkpoint(here, capsys):
    assert launch(*RUN) == 0
    words = ("run.dir=other", "run.resume=run/checkpoints/step-0000000009")
    assert again(*RUN, *words) == 0
    assert "Continuing at epoch 4 (step 9) from run/checkpoints/step" in capsys.readouterr().out
    ends = [events(here / name)[-1]["weights"] for name in ("run", "other")]
    assert ends[0] == ends[1]
    assert again(*RUN, "run.dir=third", "run.resume=run/checkpoints/step-0000000003") == 2
    assert "has no checkpoint of step 3" in message_of(capsys)


def test_a_given_checkpoint_is_gone_on_from_once(here, capsys):
    """The same command again, as after a preemption, goes on from the run's own."""
    assert launch(*RUN, "train.epochs=1") == 0
    words = ("run.dir=other", "run.resume=run/checkpoints")
    assert again(*RUN, *words, "train.epochs=2") == 0
    assert again(*RUN, *words) == 0
    assert "Continuing at epoch 3 (step 6) from other/checkpoints/step" in capsys.readouterr().out
    assert again(*RUN, "run.dir=whole") == 0
    ends = [events(here / name)[-1]["weights"] for name in ("whole", "other")]
    assert ends[0] == ends[1]


def test_an_older_checkpoint_of_its_own_is_refused(here, capsys):
    assert launch(*RUN) == 0
    assert again(*RUN, f"run.resume={here}/run/checkpoints/step-0000000009") == 2
    said = message_of(capsys)
    assert "the newest checkpoint there is of step 12, and a run goes on from" in said
    assert again(*RUN, "run.resume=run/checkpoints/step-0000000012") == 0


def test_without_a_seed_the_run_s_own_is_taken(here):
    words = ("train.epochs=2", "run.dir=a", "run.seed=null")
    assert launch(*words) == 0
    assert again(*words, "train.epochs=3") == 0
    seeds = [event["seed"] for event in events(here / "a") if event["kind"] == "start"]
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize(
    "source", ["a/best.keras", "a/checkpoints", "a/checkpoints/step-0000000003"]
)
def test_weights_to_start_with(here, source):
    assert launch("train.epochs=2", "run.dir=a") == 0
    words = ("train.epochs=1", "run.dir=b", "model.options.rate=0.0", f"run.init_from={source}")
    assert again(*words, "callbacks=[]") == 0
    with CheckpointStore("a/checkpoints").newest() as found:
        assert found is not None
    texts = [(here / f"{name}/history.csv").read_text() for name in "ab"]
    rows = [list(csv.DictReader(text.splitlines())) for text in texts]
    after = 0 if source.endswith("3") else 1
    assert float(rows[1][0]["val_loss"]) == pytest.approx(float(rows[0][after]["val_loss"]))
    assert events(here / "b")[-1]["step"] == 3  # the optimizer begins anew


def test_weights_that_do_not_fit(here, capsys):
    assert launch("run.init_from=nonesuch.weights.h5") == 2
    assert "nonesuch.weights.h5" in message_of(capsys)


def test_arrays_are_batched_and_shuffled(here):
    ends = []
    for number, seed in enumerate((5, 5, 6)):
        words = ("data.factory=mine:arrays", "model.options={seeded: 1}", f"run.seed={seed}")
        assert launch(*words, f"run.dir=run{number}") == 0
        ends.append(events(here / f"run{number}")[-1])
        runtime.current().close()
    assert ends[0]["step"] == 2 * 3  # epochs, batches of 8 of 24 samples
    assert ends[0]["weights"] == ends[1]["weights"] != ends[2]["weights"]


def test_checkpoints(here):
    words = ("train.epochs=4", "checkpoint.every_epochs=1", "checkpoint.keep_last=2")
    assert launch(*words, "callbacks=[]") == 0
    found = CheckpointStore(str(here / "run" / "checkpoints")).list()
    assert [(one.step, one.epoch) for one in found] == [(9, 2), (12, 3)]
    assert set(found[0].metrics) == {"loss", "mae", "val_loss", "val_mae"}
    kinds = [event["kind"] for event in events(here / "run")]
    assert kinds.count("checkpoint") == 4
    assert kinds[-1] == "end"


def test_checkpoints_elsewhere(here, tmp_path):
    assert (
        launch(f"checkpoint={{url: {tmp_path}/other, every_steps: 2, keep_every: 4, keep_last: 1}}")
        == 0
    )
    found = CheckpointStore(str(tmp_path / "other")).list()
    assert [one.step for one in found] == [4, 6]  # the newest stays


def test_options_may_have_any_name(here):
    assert launch("model.options={path: a, key: b, function: c}", "train.epochs=1") == 0


BEFORE = [  # known before anything is made: there is no run directory
    (["train.epoch=3"], "train.epoch is not a setting. Did you mean train.epochs?"),
    (["train.epochs=none"], "train.epochs='none' is not allowed"),
    (["run.backend=nccl"], "run.backend='nccl'"),
    (["run.preempt_notice=nonesuch://x/y"], "nonesuch://x/y: "),
    (["checkpoint.every_epoch=1"], "Did you mean checkpoint.every_epochs?"),
    (["checkpoint.keep_last=0"], "checkpoint.keep_last=0 is not allowed"),
    (["epochs"], "Write key=value"),
    (["run.replicas=2"], "replicas=2 with backend='single' is not allowed"),
    (["data.factory=nonesuch:data"], "data.factory=nonesuch:data: there is no module 'nonesuch'"),
    (["model.factory=mine:modle"], "mine has no function 'modle'. Did you mean model?"),
    (["model.factory=mine:NUMBER"], "mine has no function 'NUMBER'"),
    (["callbacks=[{EarlyStoping: {}}]"], "no 'EarlyStoping'. Did you mean EarlyStopping?"),
    (["callbacks=[{EarlyStopping: {patient: 3}}]"], "no 'patient'. Did you mean patience?"),
    (["callbacks=[{EarlyStopping: {}, CSVLogger: {}}]"], "each entry is one name"),
    (["callbacks=[{ModelCheckpoint: {}}]"], "filepath"),
    (["callbacks=[{ModelCheckpoint: {filepath: a.txt}}]"], "must end in `.keras`"),
    (["callbacks=[{ModelCheckpoint: {filepath: 3}}]"], "ModelCheckpoint"),
    (["callbacks=[{ReduceLROnPlateau: {factor: 2.0}}]"], "factor >= 1.0"),
]
AFTER = [  # known once the factories are called: the run directory says why
    (["model.factory=mine:uncompiled"], "mine:uncompiled must return a compiled keras.Model"),
    (["model.factory=mine:nothing"], "must return a compiled keras.Model, got None"),
    (["model.options.depth=3"], "model.factory=mine:model is called with depth"),
    (["data.options.seed=3"], "data.options"),
    (["data.factory=mine:one"], "data.factory=mine:one must return (training, validation)"),
    (["data.options.batched=false"], "dataset.batch(global_batch_size)"),
    (
        ["callbacks=[{ModelCheckpoint: {filepath: '{epoch}-{val_acc}.keras'}}]"],
        "Names it may use here: epoch, loss, mae, val_loss, val_mae",
    ),
    (
        ["callbacks=[{EarlyStopping: {monitor: val_acc}}]"],
        "no such metric. Available: loss, mae, val_loss, val_mae",
    ),
]


def message_of(capsys) -> str:
    _, err = capsys.readouterr()
    assert err.count("Settings error: ") == 1
    assert err.startswith("Settings error: ")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(("words", "message"), BEFORE, ids=lambda v: v[0] if v else "")
def test_bad_input_known_at_once(here, capsys, words, message):
    assert launch(*words) == 2
    assert message in message_of(capsys)
    assert not (here / "run").exists()


@pytest.mark.parametrize(("words", "message"), AFTER, ids=lambda v: v[0] if v else "")
def test_bad_input_known_later(here, capsys, words, message):
    assert launch(*words) == 2
    said = message_of(capsys)
    assert message in said
    outcome = json.loads((here / "run/outcome.json").read_text())
    assert outcome["exit_code"] == 2
    assert message in outcome["reason"]
    left = set(os.listdir(here / "run"))
    assert left <= {"checkpoints", "config.yaml", "events.jsonl", "history.csv", "outcome.json"}
    assert not (here / "run/checkpoints").exists() or not os.listdir(here / "run/checkpoints")
    assert "end" not in [e["kind"] for e in events(here / "run")]


@pytest.mark.parametrize("name", ["file", "file/below", "nonesuch://bucket/run"])
def test_a_run_directory_that_cannot_be_written(here, capsys, name):
    (here / "file").write_text("x")
    url = name if "://" in name else str(here / name)
    assert launch(f"run.dir={url}") == 2
    said = message_of(capsys)
    assert f"run.dir={url} cannot be written" in said
    assert "Set run.dir to" in said
    assert sorted(set(os.listdir(here)) - {"__pycache__"}) == ["file", "mine.py", "settings.yaml"]
    assert (here / "file").read_text() == "x"


@pytest.mark.parametrize(("rank", "local", "says"), [(2, 0, 1), (3, 1, 0)])
def test_settings_that_one_host_cannot_read(capsys, monkeypatch, rank, local, says):
    monkeypatch.setenv("HOROVOD_RANK", str(rank))
    monkeypatch.setenv("HOROVOD_LOCAL_RANK", str(local))
    assert main(["--config", "nonesuch.yaml"]) == 2
    assert capsys.readouterr().err.count("nonesuch.yaml cannot be read") == says


def test_a_missing_settings_file(here, capsys):
    assert main(["--config", "nonesuch.yaml"]) == 2
    assert "nonesuch.yaml cannot be read" in message_of(capsys)


@pytest.mark.parametrize(
    ("size", "ranks", "allowed"),
    [(10, 4, "8 or 12"), (3, 4, "4"), (65, 2, "64 or 66"), (7, 3, "6 or 9")],
)
def test_a_batch_that_cannot_be_shared(size, ranks, allowed):
    ranks_runtime = Runtime(FakeCommunicator(0, ranks))
    with pytest.raises(SettingError, match=f"={size} is not divisible by the {ranks} ranks") as e:
        check_batch(size, ranks_runtime)
    assert f"Nearest that are: {allowed}." in str(e.value)


def test_batches_that_can():
    check_batch(12, Runtime(FakeCommunicator(0, 4)))
    check_batch(13, Runtime(SingleCommunicator()))


def test_a_module_that_lacks_another(here):
    (here / "lacking.py").write_text("import nonesuch_library\n")
    with pytest.raises(SettingError, match="there is no module 'nonesuch_library'"):
        imported("data.factory", "lacking:data")


def start(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "CUDA_"))}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), "--config", "settings.yaml", *words],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_bad_input_from_a_shell(here):
    result = start(here, "train.epoch=3")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("Settings error: train.epoch is not a setting.")
    assert result.stdout == ""
    assert not (here / "run").exists()


def test_a_failure_from_a_shell(here):
    result = start(here, "model.factory=mine:failing")
    assert result.returncode == 1
    assert "RuntimeError: the factory is broken" in result.stderr
    assert "in failing" in result.stderr, "the user's own traceback"
    outcome = json.loads((here / "run/outcome.json").read_text())
    assert outcome["exit_code"] == 1
    assert outcome["reason"] == "RuntimeError: the factory is broken"


def test_a_good_run_from_a_shell_is_quiet(here):
    result = start(here)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "TensorFlow's start-up notes are silenced"
    assert re.search(r"digest [0-9a-f]{16}", result.stdout)


def test_a_notice_ends_a_run_that_then_goes_on(here):
    notice = here / "notice"
    notice.touch()
    words = ("train.epochs=3", f"run.preempt_notice={notice}")
    stopped = start(here, *words)
    assert stopped.returncode == 75
    assert f"Preempted ({notice} is there on rank 0)" in stopped.stderr
    outcome = json.loads((here / "run/outcome.json").read_text())
    assert (outcome["exit_code"], outcome["epoch"]) == (75, 0)
    (saved,) = [e["step"] for e in events(here / "run") if "state" in e]
    assert saved == outcome["step"] > 0
    notice.unlink()
    ended = start(here, *words)
    assert ended.returncode == 0
    assert f"(step {saved}) from {here}/run/checkpoints" in ended.stdout
    assert [e["kind"] for e in events(here / "run") if e["kind"] == "preempt"] == ["preempt"]


def test_the_example_is_short_and_needs_nothing_of_ours():
    text = (ROOT / "launch/digits.py").read_text()
    assert len(text.splitlines()) < 80
    assert "orchestrator" not in textwrap.dedent(text).split('"""', 2)[2].split('"""')[0]
    assert "import orchestrator" not in text
    assert "from orchestrator" not in text
