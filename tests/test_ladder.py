"""The ladder of the benchmarks: verdicts on made-up results, and a climb in which every command is played."""

from __future__ import annotations

import importlib
import io
import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

LADDER = Path(__file__).parents[1] / "benchmarks" / "ladder"


@pytest.fixture
def ladder(monkeypatch):
    """Import a script of the folder as Python runs it."""
    monkeypatch.syspath_prepend(str(LADDER))
    yield importlib.import_module
    for name in ("commands", "rules", "table", "run", "speeds", "split", "worker"):
        sys.modules.pop(name, None)


@pytest.fixture
def rules(ladder):
    return ladder("rules")


SETTING = {
    "device": "cpu",
    "seconds": 100.0,
    "train": "train",
    "held_out": "held_out",
    "autoencoder": "ae",
    "features": "judge",
    "num": 10,
    "image_size": 32,
}


def outcomes(rules, name, spec, distances, share=1.0, **more):
    """A run for each distance; None: it failed."""
    return [
        rules.Outcome(
            setting=SETTING,
            rung=name,
            title=name,
            seed=seed,
            spec=spec.key,
            against="",
            **({"failed": "diverged"} if fd is None else {"scores": {"fd": fd, **more}, "steps": 7}),
            share=share,
            machine="a processor",
        )
        for seed, fd in enumerate(distances)
    ]


def test_the_spread_is_pooled_over_both_rungs(rules):
    assert rules.pooled([1, 3], [5, 5]) == pytest.approx(1)  # variances 2 and 0
    assert rules.pooled([1, 2, 3], [10]) == pytest.approx(1)
    assert rules.pooled([1], [2]) == math.inf


@pytest.mark.parametrize(
    ("ours", "kept"),
    [([8, 8.2, 8.4], True), ([9.7, 9.9, 10.1], False), ([12, 12, 12], False), ([8], True), ([8, None], False)],
)
def test_a_rung_is_kept_if_it_gains_more_than_the_spread(rules, ours, kept):
    spec = rules.Spec({})
    verdict = rules.compare(outcomes(rules, "b", spec, ours), outcomes(rules, "a", spec, [9.8, 10, 10.2]))
    assert verdict.kept is kept
    assert bool(verdict.failed) is (None in ours)


def test_one_seed_decides_nothing_and_no_result_is_no_verdict(rules):
    spec = rules.Spec({})
    assert not rules.compare(outcomes(rules, "b", spec, [1]), outcomes(rules, "a", spec, [10])).kept
    assert rules.compare([], outcomes(rules, "a", spec, [10])) is None
    assert rules.compare(outcomes(rules, "b", spec, [1]), outcomes(rules, "a", spec, [None])) is None


def test_a_fall_of_the_recall_is_seen(rules):
    spec = rules.Spec({})
    base = outcomes(rules, "a", spec, [10], recall=0.5) + outcomes(rules, "a", spec, [10], recall=0.52)
    assert rules.compare(outcomes(rules, "b", spec, [8, 8], recall=0.4), base).recall_falls
    assert not rules.compare(outcomes(rules, "b", spec, [8, 8], recall=0.505), base).recall_falls


def test_the_time_to_a_distance_is_exact_on_a_power_law(rules):
    curve = {share: 3 * share**-0.5 for share in (0.25, 0.5, 1.0)}
    assert rules.time_to(3 * 0.4**-0.5, curve) == pytest.approx(0.4)
    assert rules.time_to(curve[0.5], curve) == pytest.approx(0.5)
    assert rules.time_to(100.0, curve) == 0.25
    assert rules.time_to(2.9, curve) == math.inf


def test_kept_rungs_are_stood_on_and_others_are_not(rules):
    rungs = {
        "0": rules.Rung(title="base", role="baseline", changes={"training": {"batch_size": 8}}),
        "1": rules.Rung(title="reference", role="reference", changes={"optimizer": {"learning_rate": 1.0}}),
        "2": rules.Rung(title="good", changes={"training": {"ema_decay": 0.5}}),
        "3": rules.Rung(title="bad", changes={"training": {"batch_size": 16}}, encode=["--variants", "4"]),
        "4": rules.Rung(title="aside", against="1", changes={"optimizer": {"clip_norm": 2.0}}),
        "5": rules.Rung(title="next", changes={"optimizer": {"warmup_steps": 3}}, ema_length=0.1),
    }
    base = {"training": {"seed": 1}}
    found: list = []
    for name, distances in zip(rungs, [[10, 11], [5, 5.1], [7, 8], [7.4, 8.3], [1, 1.1], [3, 3.2]], strict=True):
        step = next(step for step in rules.climb(rungs, found, base) if step.name == name)
        found += outcomes(rules, name, step.spec, distances)
    steps = {step.name: step for step in rules.climb(rungs, found, base)}
    assert steps["5"].spec.changes == {
        "training": {"seed": 1, "batch_size": 8, "ema_decay": 0.5},
        "optimizer": {"warmup_steps": 3},
    }
    assert [steps[name].base for name in rungs] == ["", "0", "0", "2", "1", "2"]
    assert [bool(step.verdict and step.verdict.kept) for step in steps.values()] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert (steps["5"].spec.encode, steps["5"].spec.ema_length, steps["3"].spec.encode) == (
        (),
        0.1,
        ("--variants", "4"),
    )
    assert steps["4"].spec.changes["optimizer"] == {"learning_rate": 1.0, "clip_norm": 2.0}
    assert rules.last_kept(list(steps.values())).name == "5"
    assert rules.last_kept(rules.climb(rungs, found[:2], base)).name == "0"
    # a rung that another setting kept is stood on, whatever was found here
    steps = {step.name: step for step in rules.climb(rungs, found[:2], base, ["2"])}
    assert (steps["2"].verdict, steps["2"].kept, steps["3"].base, steps["5"].base) == (None, True, "2", "2")
    assert [step.kept for step in rules.climb(rungs, found, base, ["3"])] == [True, False, True, True, False, False]
    # results of a recipe that is another one now do not count
    rungs["2"] = rungs["2"].model_copy(update={"changes": {"training": {"ema_decay": 0.9}}})
    assert {step.name for step in rules.climb(rungs, found, base) if step.verdict} == {"1", "3", "4"} - {"3"}


def test_nothing_stands_on_an_autoencoder_of_its_own(rules, ladder):
    """Its training takes seconds that the others do not have."""
    rungs = {
        "0": rules.Rung(title="base", role="baseline"),
        "1": rules.Rung(title="own", autoencoder=["training.steps=3"]),
        "2": rules.Rung(title="next", changes={"optimizer": {"warmup_steps": 3}}),
    }
    found = outcomes(rules, "0", rules.climb(rungs, [], {})[0].spec, [10, 10.1])
    found += outcomes(rules, "1", rules.climb(rungs, found, {})[1].spec, [5, 5.1])
    base, own, later = rules.climb(rungs, found, {})
    assert own.verdict.kept and not own.kept
    assert (later.base, later.spec.autoencoder, rules.last_kept([base, own, later])) == ("0", None, base)
    assert ladder("table").judged(own)[1] == "better than 0"


def test_numbers_are_multiplied_after_the_changes(rules):
    spec = rules.Spec({"training": {"batch_size": 64, "seed": 1}, "optimizer": {"learning_rate": 0.5}})
    rung = rules.Rung(
        title="",
        changes={"training": {"batch_size": 6}},
        factors={"training": {"batch_size": 0.5}, "optimizer": {"learning_rate": 3}},
    )
    assert spec.on_top(rung).changes == {"training": {"batch_size": 3, "seed": 1}, "optimizer": {"learning_rate": 1.5}}
    with pytest.raises(KeyError, match="clip"):
        spec.on_top(rules.Rung(title="", factors={"optimizer": {"clip": 2}}))


def test_what_a_recipe_depends_on_is_in_its_key(rules):
    spec = rules.Spec({"a": 1})
    others = [{"changes": {"a": 2}}, {"encode": ["-x"]}, {"autoencoder": []}, {"ema_length": 0.1}]
    keys = [spec.on_top(rules.Rung(title="", **given)) for given in others]
    assert len({one.key for one in (spec, *keys)}) == 5
    assert [one.training == spec.training for one in keys] == [False, False, False, True]


def test_a_line_that_a_kill_cut_off_is_left_out_and_repeated_runs_replace_the_first(ladder, rules, tmp_path):
    run, file = ladder("run"), tmp_path / "results.jsonl"
    for one in outcomes(rules, "0", rules.Spec({}), [None, 3]):
        run.append(file, one)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    assert [one.failed for one in rules.read_outcomes(file)] == ["diverged", ""]
    run.append(file, outcomes(rules, "0", rules.Spec({}), [2])[0])
    assert [one.distance for one in rules.read_outcomes(file)] == [2, 3]
    assert file.read_bytes().startswith(whole)


def test_a_worker_runs_commands_in_turn_and_says_why_one_failed(ladder, tmp_path):
    worker, failed = ladder("worker").Worker(), ladder("worker").Failed
    try:
        with pytest.raises(failed, match=r"info was stopped after 0\.01 s"):  # it only starts in that time
            worker.run(["info"], tmp_path / "slow", 0.01)
        encode = [
            "encode",
            "synthetic:16",
            "--autoencoder",
            "shapes",
            "--image-size",
            "32",
            "--out",
            tmp_path / "cache",
        ]
        worker.run(encode, tmp_path / "encode", 120)
        train = ["train", "own_images", f"data.path={tmp_path / 'cache'}", "training.steps=2", *TINY, "--device", "cpu"]
        for name in "ab":
            worker.run([*train, f"out={tmp_path / name}"], tmp_path / f"log_{name}", 120)
        first, second = ((tmp_path / name / "model" / "velocity.safetensors").read_bytes() for name in "ab")
        assert first == second, "what ran before in the process changed a training"
        process = worker._process
        assert "seed" in worker.run(["info", tmp_path / "a" / "model"], tmp_path / "show", 60).read_text()
        assert worker._process is process
        with pytest.raises(failed, match=r"info: latentflow: .*nowhere"):
            worker.run(["info", tmp_path / "nowhere"], tmp_path / "bad", 60)
        assert "seed" in worker.run(["info", tmp_path / "a" / "model"], tmp_path / "again", 60).read_text()
    finally:
        worker.close()


def test_a_closed_worker_ends_its_command(ladder, tmp_path):
    """And that is no failure, which would become a line."""
    module = ladder("worker")
    worker = module.Worker()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            worker.run, ["encode", "synthetic:9999999", "--out", tmp_path / "c"], tmp_path / "log", 60
        )
        while worker._process is None:
            time.sleep(0.01)
        worker.close()
        with pytest.raises(module.Stopped):
            running.result(60)
    with pytest.raises(module.Stopped):  # nor does it begin one that waited for its turn
        worker.run(["info"], tmp_path / "later", 60)
    assert worker._process is None


def test_a_worker_is_asked_to_end_once(ladder):
    """A second signal would end what it is saving because of the first."""
    module, signals = ladder("worker"), []

    class Process:
        stdin = io.BytesIO()

        def poll(self):
            return None

        def terminate(self):
            signals.append("TERM")

        def wait(self, limit):
            return 0

    workers = module.Workers(2, 1)
    for worker in workers._train:
        worker._process = Process()
    workers.close()
    assert signals == ["TERM", "TERM"]


def test_closed_workers_that_train_save_and_end(ladder, tmp_path):
    """They do not wait for another request: it would take a minute for each."""
    module = ladder("worker")
    workers = module.Workers(2, 1)
    cache = tmp_path / "cache"
    workers(["encode", "synthetic:64", "--autoencoder", "shapes", "--image-size", 32, "--out", cache], cache, 120)
    train = ["train", "own_images", f"data.path={cache}", "training.steps=9000", *TINY, "--device", "cpu"]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(workers, [*train, f"out={tmp_path / name}"], tmp_path / name, 600) for name in "ab"]
        logs = [tmp_path / name / "metrics.jsonl" for name in "ab"]
        while not all(log.exists() and log.read_text() for log in logs):
            time.sleep(0.1)
        began = time.monotonic()
        workers.close()
        for one in running:
            with pytest.raises(module.Stopped):
                one.result(60)
    assert time.monotonic() - began < 50
    assert all(list((tmp_path / name / "checkpoints").glob("step-*")) for name in "ab")


@pytest.mark.parametrize(("trainings", "verbs"), [(1, ("evaluate", "loss")), (2, ("train", "train"))])
def test_trainings_and_other_commands_have_their_workers(ladder, tmp_path, monkeypatch, trainings, verbs):
    module = ladder("worker")
    meeting = threading.Barrier(2)

    def run(worker, arguments, log, limit):
        if arguments[0] in verbs:
            meeting.wait(60)  # broken unless both are here
        return worker

    monkeypatch.setattr(module.Worker, "run", run)
    workers = module.Workers(trainings, others=2)
    with ThreadPoolExecutor(2) as pool:
        both = set(pool.map(lambda verb: workers([verb], tmp_path, 60), verbs))
    assert len(both) == 2 and workers(["encode"], tmp_path, 60) not in both.intersection(workers._train)
    if trainings == 1:
        assert workers(["train"], tmp_path, 60) is workers(["train"], tmp_path, 60), "trainings do not run in turn"


def test_rungs_are_read_in_order_and_checked(rules, tmp_path):
    (tmp_path / "0_base.yaml").write_text("{title: base, role: baseline}")
    (tmp_path / "1_more.yaml").write_text("{title: more, against: 2_later}")
    with pytest.raises(ValueError, match="against = '2_later' is none of the rungs before it: 0_base"):
        rules.read_rungs(tmp_path)
    (tmp_path / "1_more.yaml").write_text("{title: more, role: baseline}")
    with pytest.raises(ValueError, match="no other, has the role baseline"):
        rules.read_rungs(tmp_path)


def test_every_rung_is_a_recipe(ladder, rules, tmp_path):
    """With the changes of the rungs before it, as if all were kept."""
    from latentflow.data.request import EncodeRequest
    from latentflow.training.config import load_recipe
    from latentflow.training.first_stage import load_autoencoder_recipe

    rungs, recipe = rules.read_rungs(LADDER / "rungs"), ladder("run").base_recipe()
    assert [rung.role for rung in rungs.values()][:2] == ["baseline", "reference"]
    spec = rules.Spec(recipe)
    for name, rung in rungs.items():
        changed = spec.on_top(rung)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(changed.changes))
        load_recipe(tmp_path / f"{name}.yaml")
        load_autoencoder_recipe("own_images", changed.autoencoder or ())
        options = {f"--{field.replace('_', '-')}" for field in EncodeRequest.model_fields}
        assert {option for option in rung.encode if option.startswith("--")} <= options
        assert rung.ema_length is None or changed.changes["training"]["ema_lengths"]
        spec = changed if rung.role != "reference" else spec


# A whole climb

TINY = ["network={depth: 2, hidden_size: 32, num_heads: 2, patch_size: 2}", "training.batch_size=8"]


class Played:
    """Stands in for `latentflow`: runs take the milliseconds a step and reach the distances given by rung's rate."""

    def __init__(self, milliseconds, distances):
        self.milliseconds, self.distances, self.calls = milliseconds, distances, []

    def close(self):
        """As of `Workers`."""

    def __call__(self, arguments, log, limit):
        verb, *rest = map(str, arguments)
        given = dict(one.split("=", 1) for one in rest if "=" in one)
        self.calls.append((verb, given))
        log.parent.mkdir(parents=True, exist_ok=True)
        out = log.with_name(f"{log.name}.out")
        out.write_text(json.dumps({"nothing": {"loss": 3.0}, "label": {"loss": 2.0}}))
        if verb == "train":
            rate = yaml.safe_load(Path(rest[0]).read_text())["optimizer"]["learning_rate"]
            run, steps = Path(given["out"]), int(given["training.steps"])
            run.mkdir(parents=True)
            lines = [
                {"step": n, "images_seen": 8 * n, "images_per_second": 8e3 / self.milliseconds[rate]}
                for n in (1, steps)
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (run / "rate").write_text(str(rate))
        if verb == "evaluate":
            rate, folder = float((Path(rest[0]) / "rate").read_text()), Path(rest[rest.index("--out") + 1])
            folder.mkdir(parents=True)
            scores = {
                "fd": {"value": self.distances[rate].pop(0), "limit": None},
                "recall": {"value": 0.5, "limit": 0.9},
            }
            protocol = {"features": {"name": "judge", "hash": "0123456789abcdef"}, "versions": {}}
            (folder / "report.json").write_text(json.dumps({"scores": scores, "protocol": protocol}))
        return out


def arguments(tmp_path, *more):
    data = ["--train", "synthetic:16", "--held-out", "synthetic:8:1", "--autoencoder", "shapes", "--image-size", "32"]
    places = ["--work", tmp_path / "work", "--results", tmp_path / "results", "--ladder", tmp_path]
    changes = [part for change in TINY for part in ("--set", change)]
    return [str(one) for one in (*data, *places, *changes, "--num", "8", "--busy", "--probe-steps", "4", *more)]


@pytest.fixture
def two_rungs(tmp_path):
    (tmp_path / "rungs").mkdir()
    files = {
        "0": {"title": "base", "role": "baseline"},
        "1": {"title": "theirs", "role": "reference", "changes": {"optimizer": {"learning_rate": 2.0}}},
        "2": {"title": "faster", "changes": {"optimizer": {"learning_rate": 3.0}}},
    }
    for name, rung in files.items():
        (tmp_path / "rungs" / f"{name}.yaml").write_text(yaml.safe_dump(rung))


def test_a_climb_trains_every_rung_for_the_same_seconds(ladder, rules, tmp_path, monkeypatch, two_rungs):
    run = ladder("run")
    played = Played(
        {6e-4: 100.0, 2.0: 200.0, 3.0: 50.0}, {6e-4: [10, 10.2], 2.0: [12, 12.2], 3.0: [8, 8.1, 16, 12, 16.2, 12.2]}
    )
    monkeypatch.setattr(run, "Workers", lambda trainings, others: played)
    given = arguments(tmp_path, "--seconds", "60", "--seeds", "0,1", "--shares", "0.25,0.5")
    run.main(given)
    found = rules.read_outcomes(tmp_path / "results" / "results.jsonl")
    assert [(one.rung, one.seed, one.share, one.steps) for one in found] == [
        *(("0", 0, 1, 600), ("1", 0, 1, 300), ("0", 1, 1, 600), ("1", 1, 1, 300)),
        *(("2", 0, 1, 1200), ("2", 1, 1, 1200)),
        *(("final", 0, 0.25, 300), ("final", 0, 0.5, 600), ("final", 1, 0.25, 300), ("final", 1, 0.5, 600)),
    ]
    assert all(one.seconds == pytest.approx(60 * one.share) for one in found)
    assert {one.held_out_loss for one in found} == {2.0}
    # the speed of a rung is measured in turn with that of the rung below
    probes = [given["out"].rpartition("/")[2] for verb, given in played.calls if "/probes/" in given.get("out", "")]
    assert len(probes) == 3 + 6 + 6
    assert probes[3::2] == [probes[0]] * 6
    page = (tmp_path / "results" / "RESULTS.md").read_text()
    assert "network.depth=2 network.hidden_size=32" in page and "training.batch_size=8" in page
    assert "| 2 | faster | 2 | 1,200 | 8.05 ± 0.071 |" in page
    assert "| +2.05 on 0, spread 0.11 | kept |" in page
    assert "**2 reaches the distance of theirs in 0.50 of its time** (0.50 to 0.50 over 2 seeds" in page
    count = len(played.calls)
    run.main(given)
    assert len(played.calls) == count, "a finished ladder was climbed again"


def test_trainings_side_by_side_on_a_cpu(ladder, rules, tmp_path, monkeypatch, two_rungs):
    """Each with its evaluation after it; the first evaluation ends before another begins, as it makes the reference."""
    run, meeting, evaluating = ladder("run"), threading.Barrier(2), []
    monkeypatch.setattr(ladder("speeds"), "_PROBE_ROUNDS", 1)
    played = Played({6e-4: 1.0, 2.0: 1.0, 3.0: 1.0}, {6e-4: [10, 10.2], 2.0: [12, 12.2], 3.0: [8, 8.1]})

    class Meets:
        def __call__(self, arguments, log, limit):
            if arguments[0] == "train" and not any("/probes/" in str(one) for one in arguments):
                meeting.wait(60)  # broken unless two are here
            if arguments[0] == "evaluate":
                reference = Path(arguments[arguments.index("--reference-out") + 1])
                assert reference.exists() or not evaluating, "two evaluations make the reference"
                evaluating.append(reference)
                time.sleep(0.05)
                evaluating.pop()
                reference.write_text("")
            return played(arguments, log, limit)

        def close(self):
            pass

    made = []
    monkeypatch.setattr(run, "Workers", lambda *numbers: made.append(numbers) or Meets())
    given = arguments(tmp_path, "--seconds", "6", "--seeds", "0,1", "--shares", "", "--at-once", "2")
    run.main([*given, "--kept", "2", "--rungs", "1,2"])
    assert made == [(2, 2)]
    found = rules.read_outcomes(tmp_path / "results" / "results.jsonl")
    assert {(one.rung, one.seed) for one in found} == {("1", 0), ("1", 1), ("2", 0), ("2", 1)}
    page = (tmp_path / "results" / "RESULTS.md").read_text()
    assert "Kept by another setting: 2." in page
    assert "| 2 | faster | 2 | 6,000 | 8.05 ± 0.071 |" in page and "|  | kept by another setting |" in page


def test_what_fails_is_a_line_and_can_be_repeated(ladder, rules, tmp_path, monkeypatch, two_rungs):
    run = ladder("run")
    played = Played({6e-4: 100.0, 2.0: 100.0, 3.0: 100.0}, {6e-4: [10], 2.0: [12], 3.0: [8]})

    class Refused(Played):
        def __call__(self, arguments, log, limit):
            if arguments[0] == "train" and "learning_rate: 3.0" in Path(arguments[1]).read_text():
                raise run.Failed("train: latentflow: no such key")
            return super().__call__(arguments, log, limit)

    refused = Refused(played.milliseconds, played.distances)
    monkeypatch.setattr(run, "Workers", lambda trainings, others: refused)
    given = arguments(tmp_path, "--seconds", "6", "--seeds", "0", "--shares", "")
    run.main(given)
    page = (tmp_path / "results" / "RESULTS.md").read_text()
    assert "failed: train: latentflow: no such key" in page
    monkeypatch.setattr(run, "Workers", lambda trainings, others: played)
    run.main(given)
    assert (tmp_path / "results" / "RESULTS.md").read_text() == page
    run.main([*given, "--again"])
    page = (tmp_path / "results" / "RESULTS.md").read_text()
    assert "| +2 on 0 | undecided: one seed has no spread |" in page
    assert "| -2 on 0 | reference |" in page


def test_everything_is_encoded_before_the_first_speed_is_probed(ladder, rules, tmp_path, monkeypatch, two_rungs):
    """Also what only a later rung needs, once; and an autoencoder that fails is the line of its own rung."""
    more = {
        "3": {"title": "variants", "encode": ["--variants", "2"]},
        "4": {"title": "own first stage", "autoencoder": ["training.steps=1"]},
    }
    for name, rung in more.items():
        (tmp_path / "rungs" / f"{name}.yaml").write_text(yaml.safe_dump(rung))
    run = ladder("run")
    played = Played({6e-4: 100.0, 2.0: 100.0, 3.0: 100.0}, {6e-4: [10, 9], 2.0: [12], 3.0: [8]})
    verbs = []

    class Encodes:
        def __call__(self, arguments, log, limit):
            verbs.append(arguments[0])
            if arguments[0] == "train-autoencoder":
                raise run.Failed("train-autoencoder: out of ideas")
            if arguments[0] == "encode":
                folder = Path(arguments[arguments.index("--out") + 1])
                folder.mkdir(parents=True)
                (folder / "index.json").write_text("{}")
            return played(arguments, log, limit)

        def close(self):
            pass

    monkeypatch.setattr(run, "Workers", lambda trainings, others: Encodes())
    run.main(arguments(tmp_path, "--seconds", "6", "--seeds", "0", "--shares", ""))
    assert verbs[: verbs.index("train")] == ["train-autoencoder", *["encode"] * 3]
    assert "encode" not in verbs[verbs.index("train") :]
    failed = {one.rung: one.failed for one in rules.read_outcomes(tmp_path / "results" / "results.jsonl")}
    assert failed == {"0": "", "1": "", "2": "", "3": "", "4": "train-autoencoder: out of ideas"}


def test_a_real_run_ends_in_a_line(ladder, rules, tmp_path, monkeypatch, two_rungs):
    """Every command of one run, for one step."""
    run = ladder("run")
    monkeypatch.setattr(ladder("speeds"), "_PROBE_ROUNDS", 1)
    run.main(arguments(tmp_path, "--seconds", "0.001", "--seeds", "0", "--shares", "", "--rungs", "0"))
    (found,) = rules.read_outcomes(tmp_path / "results" / "results.jsonl")
    assert not found.failed
    assert found.steps == 1 and found.seconds > 0 and found.held_out_loss > 0
    assert {"fd", "precision", "recall"} <= found.scores.keys()
    assert str(tmp_path) not in (tmp_path / "results" / "results.jsonl").read_text()


def test_every_nth_image_of_each_class_is_held_out(ladder, tmp_path):
    split = ladder("split")
    for name in ("cat", "dog"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for number in range(7):
            (tmp_path / "all" / name / f"{number}.png").write_text(f"{name} {number}")
    given = [str(tmp_path / "all"), "--every", "3", "--out", str(tmp_path / "out")]
    assert split.main(given) == {"train": 10, "held_out": 4}
    held_out = sorted(
        str(file.relative_to(tmp_path / "out" / "held_out")) for file in tmp_path.glob("out/held_out/*/*")
    )
    assert held_out == ["cat/2.png", "cat/5.png", "dog/2.png", "dog/5.png"]
    assert (tmp_path / "out" / "train" / "dog" / "3.png").read_text() == "dog 3"
    with pytest.raises(SystemExit, match="exists; choose a new folder"):
        split.main(given)
    with pytest.raises(SystemExit, match="no sub-folders"):
        split.main([str(tmp_path / "all" / "cat"), "--out", str(tmp_path / "other")])


def test_what_a_killed_ladder_has_begun_keeps_others_away(ladder, tmp_path):
    """The lock is that of an open file, which the process begun has as well."""
    run = ladder("run")
    with run.alone(tmp_path):
        with pytest.raises(SystemExit, match="still works here"), run.alone(tmp_path):
            pass
        command = [sys.executable, "-c", "input()"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, close_fds=False)
    try:
        with pytest.raises(SystemExit, match="still works here"), run.alone(tmp_path):
            pass
    finally:
        process.communicate(b"\n")
    with run.alone(tmp_path):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--set", "a"], "--set a: give key=value"),
        (["--rungs", "7"], "--rungs: there is no rung '7'; there are 0, 1, 2, own"),
        (["--kept", "0,8"], "--kept: there is no rung '8'; there are 0, 1, 2, own"),
        (["--kept", "1"], "--kept: later rungs never stand on 1; leave it out"),
        (["--kept", "own"], "--kept: later rungs never stand on own; leave it out"),
        (["--at-once", "0"], "--at-once 0: give 1 or more"),
        (["--at-once", "2", "--device", "cuda"], "--at-once 2: .* leave it out on a GPU"),
        (["--seeds", "x"], "2"),
    ],
)
def test_wrong_options_of_a_climb(ladder, tmp_path, two_rungs, given, message):
    (tmp_path / "rungs" / "own.yaml").write_text("{title: own, autoencoder: [training.steps=3]}", encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        ladder("run").main(arguments(tmp_path, *given))
    with pytest.raises(SystemExit, match="--train is missing"):
        ladder("run").main(["--results", str(tmp_path / "results")])


def test_speeds_are_not_probed_on_a_busy_machine(ladder, monkeypatch):
    speeds = ladder("speeds")
    monkeypatch.setattr(speeds, "busy_share", lambda: 0.5)
    with pytest.raises(SystemExit, match="other programs take 50 % of the processors"):
        speeds.require_idle()
    monkeypatch.setattr(speeds, "busy_share", lambda: 0.05)
    speeds.require_idle()
