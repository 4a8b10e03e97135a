"""Diffuser: images, prompts it cannot read, loading, and the arguments of a pipeline's call."""

import copy
import logging
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, difference
from safetensors.torch import load_file, save_file

from config import LoopConfig, load_config
from diffuser import Diffuser, check_call
from loop import build
from sgiou import SceneGraph, load_graphs

PROMPT = "red circle left of blue square; green triangle above red circle"
OTHERS = ["yellow square below red triangle", "blue circle right of green circle"]


@pytest.fixture(scope="module")
def graphs():
    return load_graphs(ROOT / "tiny" / "data" / "val.json")


# ---- generate ----


def test_an_image_depends_on_its_seed_alone(loop, monkeypatch):
    (alone,) = loop.diffuser.generate([PROMPT], [3])
    prompts = [OTHERS[0], PROMPT, OTHERS[1], PROMPT]
    batch = loop.diffuser.generate(prompts, [1, 3, 2, 4])
    assert alone.size == (32, 32) and alone.mode == "RGB"
    assert difference(alone, batch[1]) <= 1
    assert difference(batch[1], batch[3]) > 30
    monkeypatch.setattr(loop.diffuser, "batch_size", 3)
    again = loop.diffuser.generate(prompts, [1, 3, 2, 4])
    assert difference(again, batch) <= 1


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_black_image_is_an_error(loop, monkeypatch):
    bias = loop.diffuser.pipeline.vae.decoder.conv_out.bias
    for broken in (torch.full_like(bias, torch.nan), torch.full_like(bias, -1e4)):
        monkeypatch.setattr(bias, "data", broken)
        with pytest.raises(ValueError, match="a black image.*diffuser.dtype"):
            loop.diffuser.generate([PROMPT], [0])


@pytest.mark.parametrize(
    "call", [{"max_sequence_length": 9999}, {"width": 50, "height": 30}, {"height": 33}]
)
def test_a_call_that_fails_is_one_line_that_names_the_key(loop, call):
    """Also if the image comes out in another size: the pipeline rounds what it is asked for."""
    loop.diffuser.call |= call
    with pytest.raises(ValueError, match="^key 'diffuser.call': .*$"):
        loop.diffuser.generate([PROMPT], [0])


# ---- prompts ----

LONG = "; ".join([PROMPT] * 4)  # 20 tokens


def test_prompts_that_it_cannot_read(loop, graphs):
    assert [loop.diffuser.problem(graph.prompt()) for graph in graphs] == [None] * len(graphs)
    assert "'purple circle'" in loop.diffuser.problem("purple circle left of red circle")
    assert loop.diffuser.problem(LONG) == "it has 24 tokens, and the text encoder takes 18"
    assert "half of a character" in loop.diffuser.problem("red \udcff circle")


def test_tokenizers_of_other_pipelines(loop):
    clip = copy.deepcopy(loop.diffuser.pipeline.tokenizer)
    clip.unk_token = clip.eos_token  # CLIP's end token is its unknown token, too
    loop.diffuser.pipeline = SimpleNamespace(tokenizer=clip)
    assert loop.diffuser.problem(PROMPT) is None
    loop.diffuser.pipeline = SimpleNamespace(tokenizer=object())  # a processor
    assert loop.diffuser.problem(LONG) is None


def test_graphs_that_it_cannot_read_are_counted_and_left_out(loop, graphs, caplog):
    long = SceneGraph(LONG.split("; "), [])
    assert loop.diffuser.readable([graphs[0], long, graphs[1]], "data.json") == graphs[:2]
    told = caplog.messages[-1]  # transformers may have warned, too
    assert told.startswith("data.json: 1 of 3 prompts cannot be read") and "\n" not in told
    with pytest.raises(ValueError, match="data.json: 2 of 2 prompts .* other data"):
        loop.diffuser.readable([long, long], "data.json")


# ---- loading ----


def test_it_is_frozen(loop):
    models = [m for m in loop.diffuser.pipeline.components.values() if hasattr(m, "parameters")]
    assert len(models) == 4
    assert not any(p.requires_grad for model in models for p in model.parameters())


@pytest.fixture
def flow(tmp_path, monkeypatch):
    """A copy of the shipped pipeline, to be damaged."""
    monkeypatch.chdir(ROOT)
    return shutil.copytree(ROOT / "tiny/models/flow", tmp_path / "flow")


@pytest.mark.parametrize("part", ["text_encoder_2", "transformer"])
def test_missing_weights_are_named(flow, part):
    (path,) = (flow / part).glob("*.safetensors")
    tensors = load_file(path)
    missing = sorted(tensors)[2]
    del tensors[missing]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} lacks 1 weights, such as {missing}"):
        Diffuser.load(flow)


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_weights_of_another_shape_are_named(flow, part):
    (path,) = (flow / part).glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    save_file(tensors | {name: tensors[name][1:].contiguous()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} (has|expected) shape"):
        Diffuser.load(flow)


def test_pickled_weights_are_refused(flow):
    path = flow / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(OSError, match="safetensors"):
        Diffuser.load(flow)


def test_code_in_a_folder_is_not_run(flow, monkeypatch):
    index = flow / "model_index.json"
    index.write_text(index.read_text().replace('"diffusers",\n    "FluxTr', '"code",\n    "FluxTr'))
    assert '"code"' in index.read_text()
    (flow / "transformer" / "code.py").write_text("raise SystemExit('remote code')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError):
        Diffuser.load(flow)


def test_an_error_of_loading_names_the_key(flow):
    (flow / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match="key 'diffuser.model': cannot load .*flow") as caught:
        build(load_config("eval.yaml", LoopConfig, [f"diffuser.model={flow}"]))
    assert len(str(caught.value).splitlines()) == 1


# ---- the arguments of a pipeline's call ----


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ({"num_inference_step": 8}, "num_inference_step"),
        ({"latents": [1]}, "latents"),  # cannot come from a file
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"max_area": None}, "max_area"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"joint_attention_kwargs": {"sclae": 2}}, "joint_attention_kwargs"),
        ({"true_cfg_scale": 4.0}, "negative_prompt"),  # one without the other has no effect
        ({"negative_prompt": "blue"}, "true_cfg_scale"),
        ({"height": 32}, "width and height together"),
    ],
)
def test_calls_that_cannot_be_meant_are_refused(loop, call, name):
    with pytest.raises(ValueError, match=f"'editor.call.*{name}"):
        check_call("editor.call", type(loop.editor.pipeline), call)


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 3, "num_inference_steps": 2, "height": None},
        {"true_cfg_scale": 4, "negative_prompt": ""},
    ],
)
def test_calls_that_can_be_meant_are_accepted(loop, call):
    check_call("editor.call", type(loop.editor.pipeline), call)


@pytest.mark.parametrize("part", ["diffuser", "editor"])
def test_a_typo_in_a_call_is_told_when_the_models_are_loaded(part):
    config = load_config(ROOT / "eval.yaml", LoopConfig, [f"{part}.call.num_inference_step=8"])
    with pytest.raises(ValueError, match=f"'{part}.call'.*num_inference_step"):
        build(config)


# ---- what `build` does for it ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to offload from")
def test_offload_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="key 'offload'"):
        build(load_config(ROOT / "eval.yaml", LoopConfig, ["offload=true"]))


def test_warnings_of_diffusers_are_shown_once():
    """They are about arguments of a call that the pipeline ignores."""
    build(load_config(ROOT / "eval.yaml", LoopConfig))
    logger = logging.getLogger("diffusers")
    assert logger.getEffectiveLevel() == logging.WARNING
    records = [
        logging.LogRecord("diffusers", logging.WARNING, "pipeline.py", line, "ignored", (), None)
        for line in (1, 1, 2)
    ]
    assert [bool(logger.handlers[0].filter(record)) for record in records] == [True, False, True]
