"""Editor: what it edits, what it records and replays, its adapter; on the shipped tiny model.

Other pipelines are tested in test_pipeline_families.py.
"""

import inspect
import json
import shutil

import pytest
import torch
from conftest import ROOT, bytes_of, difference, disturb
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checker
from config import LoopConfig, TrainConfig, load_config
from editor import Editor, normalize_image
from grpo import gaussian_kl, sde_step
from loop import build

PROMPTS = ["red circle left of blue square", "green triangle above red circle"]
MOVE = "move the red circle left of the blue square"


@pytest.fixture
def images(loop):
    loop.editor.call["num_inference_steps"] = 5
    return loop.diffuser.generate(PROMPTS, [0, 1])


def record(editor, images, window=range(1, 4)):
    """A rollout of two groups of three samples."""
    with torch.no_grad():
        return editor.rollout(
            [image for image in images for _ in range(3)],
            [MOVE] * 3 + ["remove the red circle"] * 3,
            [0] * 3 + [1] * 3,
            range(100, 106),
            window,
            0.8,
        )


# ---- edit ----


def test_an_edit_depends_on_its_seed_alone(loop, images, monkeypatch):
    texts = ["remove the red circle", MOVE]
    (alone,) = loop.editor.edit(images[1:], texts[1:], [3])
    batch = loop.editor.edit(images, texts, [1, 3])
    assert alone.size == (32, 32) and alone.mode == "RGB"
    assert difference(alone, batch[1]) <= 1
    monkeypatch.setattr(loop.editor, "batch_size", 1)
    assert difference(loop.editor.edit(images, texts, [1, 3]), batch) <= 1
    assert loop.editor.edit([], [], []) == []
    assert loop.editor.rollout([], [], [], [], range(1), 0.7).images == []
    with pytest.raises(ValueError, match=r"len\(images\)=1, .* need the same"):
        loop.editor.edit(images[1:], texts, [1, 3])


def test_images_from_outside_are_read_upright_in_rgb_over_white(loop, images):
    image = images[0]
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # "rotate by 90 degrees clockwise to view"
    for same in (turned, image.convert("RGBA"), image.convert("CMYK")):
        assert difference(normalize_image(same), image) == 0
    transparent = normalize_image(Image.new("RGBA", (2, 2)))
    assert bytes_of([transparent]) == bytes_of([Image.new("RGB", (2, 2), "white")])
    for mode in ("1", "L", "LA", "P"):
        assert normalize_image(Image.new(mode, (20, 10))).mode == "RGB"
    large = image.convert("RGBA").resize((2000, 1500), Image.Resampling.NEAREST)
    (expected,), (got,) = (loop.editor.edit([x], [MOVE], [0]) for x in (image, large))
    assert difference(got, expected) <= 4
    # The function is repeated where images enter, so that every component works as a copied file.
    assert inspect.getsource(checker.normalize_image) == inspect.getsource(normalize_image)


@pytest.mark.parametrize("mode", ["I", "I;16", "F", None])
def test_what_is_no_image_of_8_bits_is_refused(mode):
    with pytest.raises(ValueError, match="give a PIL image of 8 bits per channel"):
        normalize_image(Image.new(mode, (8, 8)) if mode else "image.png")


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_black_image_is_an_error(loop, images, monkeypatch):
    bias = loop.editor.pipeline.vae.decoder.conv_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    with pytest.raises(ValueError, match="a black image.*editor.dtype"):
        loop.editor.edit(images[:1], [MOVE], [0])


@pytest.mark.parametrize("call", [{"max_sequence_length": 9999}, {"width": 64}, {"max_area": 256}])
def test_a_call_that_fails_is_one_line_that_names_the_key(loop, images, call):
    """Also if the image comes out in another size than asked."""
    editor = Editor(loop.editor.pipeline, loop.editor.call | call)
    with pytest.raises(ValueError, match="key 'editor.call': ") as caught:
        editor.edit(images[:1], [MOVE], [0])
    assert len(str(caught.value).splitlines()) == 1


def test_an_instruction_that_the_pipeline_cuts_is_reported_once(loop, images, caplog):
    loop.editor.edit(images, [MOVE, MOVE], [0, 1])
    assert "reads only" not in caplog.text
    for _ in range(2):
        loop.editor.edit(images, [MOVE, MOVE + " and remove the red circle"], [0, 1])
    (line,) = [x for x in caplog.text.splitlines() if "reads only" in x]
    assert "only 8 tokens" in line and "editor.call.max_sequence_length" in line


# ---- which pipelines ----


@pytest.mark.parametrize("name", ["FluxPipeline", "Flux2KleinKVPipeline"])  # no image; a cache
def test_other_pipelines_are_refused_by_name_before_weights_are_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    index = {"_class_name": name, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))  # and no weights at all
    config = load_config("eval.yaml", LoopConfig, [f"editor.model={tmp_path}"])
    with pytest.raises(ValueError, match=f"key 'editor.model': .*{name}"):
        build(config)


def test_another_scheduler_is_refused(loop):
    from diffusers import UniPCMultistepScheduler

    loop.editor.pipeline.scheduler = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="UniPCMultistepScheduler cannot be recorded"):
        Editor(loop.editor.pipeline)


# ---- recording and replay ----


def test_it_replays_what_it_sampled(loop, images):
    disturb(loop.editor.add_adapter(4))
    recorded = record(loop.editor, images)
    assert len(recorded.images) == 6 and len(recorded.steps) == 3
    for step in recorded.steps:
        with loop.editor.adapter(), torch.no_grad():
            log_prob, mean, std = loop.editor.replay(step)
        assert (log_prob - step.log_prob).abs().max() <= 1e-6
        assert (mean - step.mean).abs().max() <= 1e-5
        by_hand = torch.distributions.Normal(mean, std).log_prob(step.next_sample)
        assert (by_hand.mean((1, 2)) - step.log_prob).abs().max() <= 1e-5
        with torch.no_grad():
            base = loop.editor.replay(step)[0]
        assert (base - step.log_prob).abs().max() > 1e-4


def test_a_group_shares_what_is_before_the_window(loop, images):
    first = record(loop.editor, images).steps[0]
    for group in (slice(0, 3), slice(3, 6)):
        before, after = first.sample[group], first.next_sample[group]
        assert (before - before[0]).abs().max() < 1e-6
        assert not torch.allclose(after[1:], after[:2])
    assert not torch.allclose(first.sample[0], first.sample[3])


def test_the_last_step_is_never_recorded(loop, images):
    assert len(record(loop.editor, images, range(3, 5)).steps) == 1  # of steps 0 to 4
    assert "step" not in vars(loop.editor.pipeline.scheduler)  # diffusers' own again


def test_activation_checkpointing_and_offload_change_no_gradient(loop, images):
    """Offload: accelerate's hooks around the forward pass, with the CPU as the device."""
    parameters = loop.editor.add_adapter(4)
    disturb(parameters)

    def log_prob_and_gradient():
        step = record(loop.editor, images).steps[0]
        with loop.editor.adapter():
            log_prob = loop.editor.replay(step)[0]
            return log_prob, *torch.autograd.grad(log_prob.sum(), parameters)

    expected = log_prob_and_gradient()
    loop.editor.pipeline.enable_model_cpu_offload(device="cpu")
    loop.editor.pipeline.transformer.enable_gradient_checkpointing()
    for got, want in zip(log_prob_and_gradient(), expected):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


def test_the_mean_drift_correction_makes_the_clip_symmetric():
    """The line of phase 2 after GRPO-Guard (arXiv 2510.22319), simulated with 65,536 dimensions.

    Without it 91% of the samples are clipped low and none high; with it 8% to 9% on each side.
    """
    generator = torch.Generator().manual_seed(0)
    B, D = 200, 65_536
    zeros = torch.zeros(1, D).expand(B, D)
    step = {"sigma": 0.7, "sigma_next": 0.6, "noise_level": 0.8}
    next_sample, old, old_mean, std = sde_step(zeros, zeros, **step, generator=generator)
    update = 0.161 * std * torch.randn(1, D, generator=generator)  # of the velocity
    _, new, mean, _ = sde_step(zeros + update, zeros, **step, next_sample=next_sample)
    drift = ((mean - old_mean) / std).square().mean().sqrt().item()
    assert drift == pytest.approx(0.021, abs=0.001)  # in std per dimension
    bound = 1.37 * drift / D**0.5

    def clipped(log_probs):
        """The shares of samples clipped low, if A < 0, and high, if A > 0."""
        ratio = (log_probs - old).exp()
        return [(ratio < 1 - bound).float().mean(), (ratio > 1 + bound).float().mean()]

    low, high = clipped(new)
    assert low > 0.85 and high == 0
    assert all(0.05 < share < 0.13 for share in clipped(new + gaussian_kl(mean, old_mean, std)))


def test_guidance_that_cannot_be_replayed_is_refused(loop, images):
    loop.editor.call |= {"true_cfg_scale": 2.5, "negative_prompt": "red circle"}
    assert len(record(loop.editor, images).steps) == 3
    loop.editor.kind = loop.editor.kind._replace(rescaled=True)  # which Kontext does not do
    with pytest.raises(ValueError, match="guidance cannot be replayed; turn it off"):
        record(loop.editor, images)


# ---- the adapter ----


@pytest.fixture
def adapter(loop, tmp_path):
    """The file of a trained adapter of rank 4."""
    disturb(loop.editor.add_adapter(4))
    loop.editor.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter" / "pytorch_lora_weights.safetensors"


@pytest.fixture
def fresh():
    """Function that makes an Editor of the same models, without adapter."""
    five_steps = ["editor.call.num_inference_steps=5"]
    config = load_config(ROOT / "phase1.yaml", TrainConfig, five_steps)
    return lambda: build(config).editor


def test_the_untrained_editor_edits_as_before(loop, images):
    edits = images, [MOVE, MOVE], [1, 2]
    untrained = loop.editor.edit(*edits)
    disturb(loop.editor.add_adapter(4))
    assert difference(loop.editor.edit(*edits), untrained) > 1
    assert bytes_of(loop.editor.without_adapter().edit(*edits)) == bytes_of(untrained)


def rewrite(path, change, keep_metadata=False):
    """Pass the tensors of a file through a function; drop the metadata, as other programs do."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() if keep_metadata else {"format": "pt"}
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata)


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "keep_metadata"),
    [
        (without("single_transformer_blocks.0.attn.to_k.lora_B"), False),
        # The config in the file names these layers. Without it, they would not be missed.
        (without("single_transformer_blocks"), True),
        (lambda tensors: {k.replace("lora_A", "lora_C"): v for k, v in tensors.items()}, False),
        (lambda tensors: tensors | {"text_encoder.q.lora_A.weight": torch.zeros(4, 32)}, False),
        (lambda tensors: tensors | {"transformer.proj_out.bias": torch.zeros(16)}, False),
        (lambda tensors: tensors | {"transformer.x.dora_scale": torch.zeros(16)}, False),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter, fresh, change, keep_metadata):
    rewrite(adapter, change, keep_metadata)
    editor = fresh()
    bias = editor.pipeline.transformer.proj_out.bias.clone()
    with pytest.raises(ValueError, match="no adapter of this Editor"):
        editor.load_adapter(adapter.parent)
    assert torch.equal(editor.pipeline.transformer.proj_out.bias, bias)


def test_a_folder_with_two_adapters_is_refused(adapter, fresh):
    shutil.copy(adapter, adapter.with_name("other.safetensors"))
    with pytest.raises(ValueError, match="holds 2 safetensors files"):
        fresh().load_adapter(adapter.parent)


def test_an_adapter_of_another_program(loop, images, adapter, fresh):
    """Without metadata, and with a scale of 2 in `.alpha` tensors, as kohya's scripts write it."""

    def with_alpha(tensors):
        names = [name for name in tensors if "lora_A" in name]
        alphas = {name.replace(".lora_A.weight", ".alpha"): torch.tensor(8.0) for name in names}
        return tensors | alphas

    expected = loop.editor.edit(images, [MOVE, MOVE], [1, 2])
    rewrite(adapter, dict)
    editor = fresh()
    editor.load_adapter(adapter.parent)
    assert difference(editor.edit(images, [MOVE, MOVE], [1, 2]), expected) <= 1

    rewrite(adapter, with_alpha)
    editor = fresh()
    editor.load_adapter(adapter.parent)
    layers = [m for m in editor.pipeline.transformer.modules() if hasattr(m, "scaling")]
    assert all(layer.scaling == {"editor": 2.0} for layer in layers)
    edited = editor.edit(images, [MOVE, MOVE], [1, 2])
    editor.save_adapter(adapter.parent)  # after training went on from it
    again = fresh()
    again.load_adapter(adapter.parent)
    assert difference(again.edit(images, [MOVE, MOVE], [1, 2]), edited) <= 1


def test_an_adapter_trained_in_fp32_loads_in_fp32(adapter, fresh):
    editor = fresh()
    editor.pipeline.transformer.to(torch.bfloat16)
    editor.load_adapter(adapter.parent)
    tensors = load_file(adapter)
    for name, parameter in editor.pipeline.transformer.named_parameters():
        if ".editor." in name:
            assert torch.equal(parameter, tensors[f"transformer.{name.replace('.editor', '')}"])


def test_training_goes_on_from_a_loaded_adapter(images, adapter, fresh):
    editor = fresh()
    editor.load_adapter(adapter.parent)
    with pytest.raises(ValueError, match="rank 4; set rank=4"):
        editor.add_adapter(8)
    for _ in range(2):  # a second training in a notebook gets it again
        parameters = editor.add_adapter(4)
        step = record(editor, images).steps[0]
        with editor.adapter():
            editor.replay(step)[0].sum().backward()
        assert len(parameters) == len(load_file(adapter))
        assert all(p.grad.abs().sum() > 0 and p.dtype == torch.float32 for p in parameters)
    assert not editor.pipeline.transformer.training


def test_a_diffuser_with_the_same_pipeline_never_meets_the_adapter(loop, images):
    assert loop.editor.pipeline is loop.diffuser.pipeline
    disturb(loop.editor.add_adapter(4))
    record(loop.editor, images)

    def fail(*_):
        raise RuntimeError("in the middle of a rollout")

    hook = loop.editor.pipeline.transformer.register_forward_hook(fail)
    with pytest.raises(ValueError, match="in the middle of a rollout"):
        record(loop.editor, images)
    hook.remove()
    again = loop.diffuser.generate(PROMPTS, [0, 1])
    assert bytes_of(again) == bytes_of(images)
