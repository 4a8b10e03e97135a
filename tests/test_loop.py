"""loop.py: what a trajectory consists of, and the command line. The parts are scripted."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from scripted import GRAPH, MOVE, Script, move, run

import loop
from config import LoopConfig, load_config
from loop import build, sha256_sums
from report import story
from sgiou import load_graphs

PARTS = ("diffuser", "checker", "actor", "editor")
WITHOUT = ["actor.adapter=", "editor.adapter="]


def numbers(trajectory):
    """Which edit each step shows: 0 is the generated image."""
    return [step.image.number for step in trajectory.steps]


def test_each_round_edits_the_image_and_checks_it_against_the_original_graph():
    (trajectory,), script = run({5: [0.1, 0.2, 0.3]}, rounds=2)
    assert numbers(trajectory) == [0, 1, 2]
    (generated,) = script.made("generate")
    assert (generated.prompts, generated.seeds) == (["red circle left of blue square"], [5])
    first, second = script.made("propose")
    assert first.prompts == second.prompts == ["red circle left of blue square"]
    assert (
        first.feedback == [trajectory.steps[0].reflection.feedback] and "wrong" in first.feedback[0]
    )
    assert [call.instructions for call in script.made("edit")] == [[move(1)], [move(2)]]
    assert [call.graphs for call in script.made("check")] == [[GRAPH]] * 3
    assert [step.source for step in trajectory.steps] == [None, 0, 1]
    assert [step.instruction for step in trajectory.steps] == [None, move(1), move(2)]


def test_a_trajectory_stops_when_satisfied_and_others_go_on():
    trajectories, script = run({1: [0.1, 0.2, 0.3, 0.4], 2: [0.1, 0.7], 3: [0.9]})
    assert [numbers(t) for t in trajectories] == [[0, 1, 2, 3], [0, 1], [0]]
    assert [[image.seed for image in call.images] for call in script.made("propose")] == [
        [1, 2],
        [1],
        [1],
    ]


@pytest.mark.parametrize(
    ("scores", "best"),
    [([0.1, 0.4, 0.3, 0.2], 1), ([0.3, 0.3, 0.3, 0.3], 0)],
)
def test_the_answer_is_the_best_image_and_the_earliest_of_equals(scores, best):
    (trajectory,), _ = run({1: scores})
    assert trajectory.best_index == best and trajectory.best is trajectory.steps[best]


def test_an_edit_starts_from_the_best_image_so_far():
    (trajectory,), script = run({1: [0.1, 0.4, 0.3, 0.45, 0.2]}, rounds=4)
    best_so_far = [0, 1, 1, 3]
    assert [step.source for step in trajectory.steps] == [None, *best_so_far]
    sources = [[trajectory.steps[index].image] for index in best_so_far]
    assert [call.images for call in script.made("propose")] == sources
    assert [call.images for call in script.made("edit")] == sources


def test_malformed_and_none_edit_nothing():
    written = {1: [None, "none", MOVE], 2: [MOVE, None, "none"]}
    (first, second), script = run({1: [0.1] * 4, 2: [0.3, 0.4]}, instructions=written)
    assert [step.instruction for step in first.steps] == [None, None, "none", MOVE]
    assert [step.is_edit for step in first.steps] == [False, False, False, True]
    assert numbers(first) == [0, 0, 0, 3] and numbers(second) == [0, 1, 1, 1]
    assert first.steps[2].reflection is first.steps[0].reflection
    assert [step.source for step in second.steps] == [None, 0, 1, 1]
    assert [[i.seed for i in call.images] for call in script.made("edit")] == [[2], [1]]


def test_every_edit_has_a_seed_of_its_own():
    _, script = run({7: [0.1] * 4, 8: [0.1] * 4, 9: [0.1] * 4}, instructions={7: [None]})
    seeds = [seed for call in script.made("edit") for seed in call.seeds]
    assert len(seeds) == 8 and len({7, 8, 9, *seeds}) == 11
    asked = [seed for call in script.made("propose") for seed in call.seeds]
    assert len(asked) == len(set(asked)) == 9


def test_a_trajectory_has_the_same_seeds_alone_and_among_others():
    def seeds_of_7(scores):
        _, script = run(scores)
        calls = [*script.made("propose"), *script.made("edit")]
        pairs = [pair for call in calls for pair in zip(call.images, call.seeds)]
        return [seed for image, seed in pairs if image.seed == 7]

    assert seeds_of_7({7: [0.1] * 4}) == seeds_of_7({5: [0.2] * 4, 7: [0.1] * 4, 9: [0.1, 0.9]})


# ---- no instruction is carried out twice on the same image ----


def test_the_actor_reads_what_was_tried_on_the_best_image():
    """Edits that do not help are remembered until a better image takes over."""
    (trajectory,), script = run({1: [0.2, 0.1, 0.3, 0.1, 0.1]}, rounds=4)
    tried = [call.tried for call in script.made("propose")]
    assert tried == [[[]], [[move(1)]], [[]], [[move(3)]]]
    assert trajectory.tried == [move(3), move(4)]


def test_an_instruction_that_was_tried_is_asked_for_again_with_other_seeds_and_hotter():
    written = {1: [MOVE, MOVE, MOVE, "swap"], 2: ["add", "remove"]}
    (first, second), script = run({1: [0.2, 0.1, 0.1], 2: [0.2, 0.1, 0.1]}, 2, written)
    assert [step.instruction for step in first.steps] == [None, MOVE, "swap"]
    assert [step.instruction for step in second.steps] == [None, "add", "remove"]
    calls = script.made("propose")
    assert [len(call.images) for call in calls] == [2, 2, 1, 1]  # only the one that repeats
    seeds = [seed for call in calls for seed in call.seeds]
    assert len(set(seeds)) == 6
    assert [call.temperature for call in calls] == [1.0, 1.0, loop.HOTTER, loop.HOTTER**2]


def test_an_actor_that_insists_edits_nothing():
    (trajectory,), script = run({1: [0.2, 0.1]}, 2, {1: [MOVE] * (1 + loop.ATTEMPTS)})
    assert len(script.made("edit")) == 1
    last = trajectory.steps[-1]
    assert (last.instruction, last.repeated, last.is_edit) == (MOVE, True, False)
    assert last.image is trajectory.steps[0].image
    assert trajectory.tried == [MOVE]  # not counted twice
    assert "(asked 8 times) (tried before: no edit)" in story(trajectory)


# ---- the command line ----


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Runs loop.py with a script in place of the models; returns the output folder."""
    config = tmp_path / "config.yaml"
    parts = [f"{part}: {{model: {tmp_path}}}" for part in PARTS]
    config.write_text("\n".join([*parts, "relations: [left of, above]", "rounds: 2"]))
    out = tmp_path / "out"

    def run_program(script, *arguments):
        command = ["loop.py", *arguments, "--config", str(config), "--out", str(out)]
        monkeypatch.setattr(loop, "build", lambda config: script.loop(config.rounds))
        monkeypatch.setattr(sys, "argv", command)
        loop.main()
        return out

    return run_program


def samples(out):
    return json.loads((out / "samples" / "0000.json").read_text())


def test_one_prompt(program, capsys):
    out = program(Script({4: [0.1, 0.2, 0.3]}), "red circle LEFT_OF blue square", "--seed", "4")
    printed = capsys.readouterr().out
    assert "red circle left of blue square" in printed and "image 2: score 0.30" in printed
    assert str(out / "strip.png") in printed and str(out / "report.html") in printed
    assert {path.name for path in out.glob("*.png")} == {"0.png", "1.png", "2.png", "strip.png"}
    assert Image.open(out / "0.png").size == (32, 32)
    (sample,) = samples(out)
    assert sample["seed"] == 4 and len(sample["steps"]) == 3  # the config's two rounds


def test_a_prompt_and_an_image(program, monkeypatch):
    script = Script({0: [0.1, 0.2]})
    monkeypatch.setattr(loop, "open_image", lambda path: script.image(0, 0))
    out = program(script, "sun above sea", "--image", "mine.png", "rounds=1")
    assert script.made("generate") == [] and len(script.made("edit")) == 1
    assert [step["score"] for step in samples(out)[0]["steps"]] == [0.1, 0.2]


def test_an_image_in_the_output_folder_is_not_overwritten(program, monkeypatch, tmp_path):
    script = Script({0: [0.9]})
    monkeypatch.setattr(loop, "open_image", lambda path: script.image(0, 0))
    with pytest.raises(SystemExit, match="--image: .*0.png would be replaced; set another --out"):
        program(script, "sun above sea", "--image", str(tmp_path / "out" / "0.png"))
    program(script, "sun above sea", "--image", str(tmp_path / "out" / "mine.png"))


def test_a_huge_image_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="^--image: .*huge.png"):
        loop.open_image(tmp_path / "huge.png")


def test_an_image_from_a_file(tmp_path):
    Image.new("CMYK", (40, 30)).save(tmp_path / "mine.jpg")
    image = loop.open_image(tmp_path / "mine.jpg")
    assert (image.mode, image.size) == ("RGB", (40, 30))
    (tmp_path / "text.png").write_text("text")
    for path in (tmp_path, tmp_path / "text.png", tmp_path / "nowhere.png"):
        with pytest.raises(ValueError, match=f"^--image: {path}: .*; give a PNG or JPEG"):
            loop.open_image(path)


def test_options_and_overrides_in_any_order(program):
    words = ["--seed", "0", "rounds=1", "--seed", "0", "sun above sea", "actor.temperature=0.5"]
    assert len(samples(program(Script({0: [0.1] * 4}), *words))[0]["steps"]) == 2


def test_a_file_of_prompts_after_a_longer_one(program, tmp_path, caplog):
    """Prompts that the Diffuser cannot read are left out; of an earlier run no image stays."""
    path = tmp_path / "prompts.txt"
    path.write_text("sun above sea\nmoon\nstar\n")
    program(Script({0: [0.1, 0.2, 0.3], 1: [0.8], 2: [0.7]}), "--prompts", str(path))
    path.write_text("sun above sea\ndog\n\n  tree left of house; moon\n")
    out = program(Script({0: [0.7], 1: [0.8]}), "--prompts", str(path))
    assert "1 of 3 prompts cannot be read ('dog': too hard)" in caplog.text
    assert [(s["prompt"], s["seed"]) for s in samples(out)] == [
        ("sun above sea", 0),
        ("tree left of house; moon", 1),
    ]
    images = ["0000/0.png", "0000/strip.png", "0001/0.png", "0001/strip.png"]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == images


def test_prompts_are_written_batch_by_batch(program, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PROMPTS_PER_BATCH", 2)
    path = tmp_path / "prompts.txt"
    path.write_text("sun above sea\n" * 5)
    with pytest.raises(KeyError):  # the script has no fifth image
        program(Script({seed: [0.9] for seed in range(4)}), "--prompts", str(path))
    written = [str(p.relative_to(tmp_path / "out")) for p in tmp_path.glob("out/*/0.png")]
    assert sorted(written) == ["0000/0.png", "0001/0.png", "0002/0.png", "0003/0.png"]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_prompt_that_the_diffuser_cannot_read_is_refused(program):
    script = Script({})
    with pytest.raises(SystemExit) as ended:
        program(script, "dog above sea")
    assert ended.value.code == "loop.py: prompt 'dog above sea': too hard"
    assert script.calls == []


@pytest.mark.parametrize("words", [[], ["sun above sea", "--prompts", "x.txt"]])
def test_neither_or_more_than_one_prompt(program, words):
    with pytest.raises(SystemExit) as ended:
        program(Script({}), *words)
    assert ended.value.code == 2


def test_ctrl_c_during_the_imports_shows_no_traceback(tmp_path):
    """A config.py that takes forever stands for the libraries."""
    shutil.copy(ROOT / "loop.py", tmp_path)
    (tmp_path / "config.py").write_text("print(flush=True)\nwhile True: pass\n")
    command = [sys.executable, "loop.py", "sun"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    program = f"import loop; loop.output_folder({str(tmp_path)!r}); print(flush=True); input()"
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(ValueError, match=f"{tmp_path}: another process is writing to this folder"):
        loop.output_folder(str(tmp_path))
    process.communicate(b"\n", timeout=60)
    loop.output_folder(str(tmp_path))


# ---- the shipped models ----


def test_a_trajectory_is_the_same_alone_and_among_twenty_others(shipped):
    graphs = load_graphs(ROOT / "tiny/data/val.json", limit=21)
    among = shipped.run(graphs, list(range(21)))[7]
    (alone,) = shipped.run(graphs[7:8], [7])
    assert len(alone.steps) > 2
    for one, other in zip(alone.steps, among.steps, strict=True):
        assert (one.thought, one.instruction) == (other.thought, other.instruction)
        assert one.reflection.probs == pytest.approx(other.reflection.probs, abs=1e-3)


def test_the_shipped_loop_ends_better_than_it_starts(shipped):
    graphs = load_graphs(ROOT / "tiny/data/val.json", limit=12)
    trajectories = shipped.run(graphs, list(range(12)))
    before = sum(t.steps[0].reflection.score for t in trajectories)
    assert sum(t.best.reflection.score for t in trajectories) > before + 0.5


@pytest.mark.parametrize(("name", "file"), [("flow", "vae/*.safetensors"), ("vlm", "config.json")])
def test_a_damaged_model_is_refused(name, file, tmp_path):
    folder = shutil.copytree(ROOT / "tiny/models" / name, tmp_path / "model")
    loop.check_sums(folder)
    (path,) = folder.glob(file)
    data = bytearray(path.read_bytes())
    data[-9] ^= 4  # one bit
    path.write_bytes(data)
    part = {"flow": "diffuser", "vlm": "checker"}[name]
    config = load_config(ROOT / "eval.yaml", LoopConfig, [*WITHOUT, f"{part}.model={folder}"])
    with pytest.raises(ValueError, match=f"^key '{part}.model': .*SHA256SUMS does not match"):
        build(config)


def test_parts_with_equal_settings_share_their_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    loop = build(load_config("eval.yaml", LoopConfig, WITHOUT))
    assert loop.checker.model is loop.actor.model
    assert loop.diffuser.pipeline is loop.editor.pipeline
    others = ["actor.attention=eager", "editor.dtype=bfloat16"]
    loop = build(load_config("eval.yaml", LoopConfig, WITHOUT + others))
    assert loop.checker.model is not loop.actor.model
    assert loop.actor.model.config._attn_implementation == "eager"
    assert loop.editor.pipeline.dtype == torch.bfloat16
    assert loop.diffuser.pipeline.dtype == torch.float32


@pytest.mark.parametrize("part", ["checker", "editor"])
def test_a_device_that_is_not_there_is_named(part, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("eval.yaml", LoopConfig, [*WITHOUT, f"{part}.device=cuda:99"])
    with pytest.raises(ValueError, match=f"^key '{part}.device': cannot load 'cuda:99': "):
        build(config)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of new adapters as train.py leaves them: of the Actor, of the Editor."""
    config = load_config(ROOT / "eval.yaml", LoopConfig, WITHOUT)
    made, folders = build(config), {}
    for part in ("actor", "editor"):
        folders[part] = tmp_path_factory.mktemp(part)
        getattr(made, part).add_adapter(4)
        getattr(made, part).save_adapter(folders[part])
        (folders[part] / "SHA256SUMS").write_text(sha256_sums(folders[part]))
    return folders


@pytest.mark.parametrize(("part", "other"), [("actor", "editor"), ("editor", "actor")])
def test_adapters_are_checked_when_they_are_loaded(part, other, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def loaded(folder):
        return build(load_config("eval.yaml", LoopConfig, [*WITHOUT, f"{part}.adapter={folder}"]))

    copy = tmp_path / "adapter"
    shutil.copytree(adapters[part], copy)
    assert getattr(loaded(copy), part).has_adapter
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=copy, check=True)
    with pytest.raises(ValueError, match=f"^key '{part}.adapter': cannot load .* no adapter of"):
        loaded(adapters[other])
    (copy / "._adapter_config.json").write_text("what a Mac leaves in folders")
    loaded(copy)
    (path,) = copy.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 4  # one bit
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"key '{part}.adapter'.*SHA256SUMS does not match"):
        loaded(copy)
