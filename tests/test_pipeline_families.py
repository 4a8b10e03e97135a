"""Every pipeline that may be the Editor: the real class with tiny random weights, no download.

Each edits, is recorded and replayed, and gets an adapter that diffusers reads. Its gradient is
compared with a finite difference that uses no replay: the pipeline runs anew with other LoRA
weights from the same latents.
"""

import functools
import importlib.util
import sys
import warnings
from unittest import mock

import pytest
import torch
from conftest import ROOT, bytes_of, difference, disturb
from PIL import Image

from diffuser import Diffuser
from editor import PIPELINES, Editor
from grpo import sde_step

sys.path.insert(0, str(ROOT / "gpu"))

import architectures  # noqa: E402

TORCHVISION = importlib.util.find_spec("torchvision") is not None
if not TORCHVISION:
    warnings.warn("no torchvision: four of the Editor's pipelines are not tested", stacklevel=1)
# Long, because QwenImageEdit drops the first 64 tokens of what it reads.
INSTRUCTIONS = [6 * "move the red circle left of the blue square ", 6 * "move the blue square "]
SMALL = architectures.SIZES["tiny"]["Qwen3ForCausalLM"]


def scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def qwen_vae(name, **more):
    import diffusers

    sizes = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1}
    sizes |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return getattr(diffusers, name)(**sizes | more)


def qwen_vl(family):
    """A tiny model of Qwen2_5_VL or Qwen3VL, and its own processor."""
    import transformers

    model, stand_in = architectures.qwen_vl(f"{family}ForConditionalGeneration", tiny=True)
    video = "Qwen2VL" if family == "Qwen2_5_VL" else family
    processor = getattr(transformers, f"{family}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=stand_in.image_processor.patch_size, min_pixels=64 * 64, max_pixels=64 * 64
        ),
        tokenizer=stand_in.tokenizer,
        video_processor=getattr(transformers, f"{video}VideoProcessor")(),
        chat_template=stand_in.tokenizer.chat_template,
    )
    return model, processor


def fibo_edit():
    """Guides by one call with a batch twice as large; its text encoder is SmolLM3."""
    from diffusers import BriaFiboEditPipeline, BriaFiboTransformer2DModel
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SMALL | {"num_hidden_layers": 2, "pad_token_id": 0, "vocab_size": 128256}
    return BriaFiboEditPipeline(
        scheduler=scheduler(),
        vae=qwen_vae(
            "AutoencoderKLWan",
            dim_mult=[1, 1, 1, 1],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        ),
        text_encoder=SmolLM3ForCausalLM(SmolLM3Config(**config, no_rope_layers=[1, 1])).eval(),
        tokenizer=architectures.tokenizer(),
        transformer=BriaFiboTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            axes_dims_rope=[4, 6, 6],
            text_encoder_dim=32,
        ).eval(),
    )


def fibo_2():
    """Its latents are images, (B, channels, height, width), and not tokens."""
    from diffusers import BriaFibo2Pipeline, BriaFibo2Transformer2DModel

    text_encoder, processor = qwen_vl("Qwen3VL")
    return BriaFibo2Pipeline(
        scheduler=scheduler(),
        vae=architectures.build("AutoencoderKLFlux2", tiny=True),
        text_encoder=text_encoder,
        processor=processor,
        transformer=BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=96,
            injection_layer_ids=(1,),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=4,
            gist_min_text_len=4,
            gist_max_text_len=64,
            axes_dims=(4, 6, 6),
        ).eval(),
    )


def qwen_edit(name):
    """Guides by two calls, and gives the result the length of the conditional answer."""
    import diffusers

    text_encoder, processor = qwen_vl("Qwen2_5_VL")
    return getattr(diffusers, name)(
        scheduler=scheduler(),
        vae=qwen_vae("AutoencoderKLQwenImage", dim_mult=[1, 1, 1, 1]),
        text_encoder=text_encoder,
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )


def qwen_21():
    """Its later steps read keys and values of the first one, unless told not to."""
    from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel

    text_encoder, processor = qwen_vl("Qwen3VL")
    return QwenImage21Pipeline(
        scheduler=scheduler(),
        vae=qwen_vae("AutoencoderKLQwenImage21", decoder_base_dim=4, dim_mult=[1, 1, 1, 1, 1]),
        text_encoder=text_encoder,
        processor=processor,
        transformer=QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=32,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )


MAKE = {
    "FluxKontextPipeline": lambda: architectures.kontext(True),
    "Flux2KleinPipeline": lambda: architectures.klein(True),
    "BriaFiboEditPipeline": fibo_edit,
    "BriaFibo2Pipeline": fibo_2,
    "QwenImageEditPipeline": lambda: qwen_edit("QwenImageEditPipeline"),
    "QwenImageEditPlusPipeline": lambda: qwen_edit("QwenImageEditPlusPipeline"),
    "QwenImage21Pipeline": qwen_21,
}
NEEDS_TORCHVISION = [name for name in MAKE if "Qwen" in name or name == "BriaFibo2Pipeline"]
CALL = {"height": 64, "width": 64, "num_inference_steps": 4}
QWEN_GUIDANCE = {"true_cfg_scale": 1.0}, {"true_cfg_scale": 4.0, "negative_prompt": 24 * "red "}
CALLS = {  # of every family: the arguments without guidance, and what turns guidance on
    "FluxKontextPipeline": (
        {"max_area": 4096, "_auto_resize": False, "max_sequence_length": 12},
        {"true_cfg_scale": 2.5, "negative_prompt": "red"},
    ),
    "Flux2KleinPipeline": (
        {"guidance_scale": 1.0, "max_sequence_length": 24, "text_encoder_out_layers": [1, 2, 3]},
        {"guidance_scale": 4.0},
    ),
    "BriaFiboEditPipeline": ({"guidance_scale": 1.0}, {"guidance_scale": 5.0}),
    "BriaFibo2Pipeline": ({"guidance_scale": 1.0}, {"guidance_scale": 5.0}),
    "QwenImageEditPipeline": QWEN_GUIDANCE,
    "QwenImageEditPlusPipeline": QWEN_GUIDANCE,
    "QwenImage21Pipeline": (
        {"output_resolution": 64},
        {"true_cfg_scale": 3.0, "negative_prompt": "red"},
    ),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes that the pipelines have as constants, reduced to what a test can wait for."""
    from diffusers.pipelines.bria_fibo2 import pipeline_bria_fibo2 as fibo
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    monkeypatch.setattr(edit, "calculate_dimensions", lambda *_: (64, 64, None))
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(fibo, "TEXT_ENCODER_OUT_LAYERS", ((1, 2, 3), (0, 1, 2)))


def noise_images(count):
    noise = torch.randint(0, 256, (count, 4, 4, 3), generator=torch.Generator().manual_seed(0))
    small = [Image.fromarray(pixels.byte().numpy()) for pixels in noise]
    return [image.resize((64, 64), Image.Resampling.BICUBIC) for image in small]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Function of a pipeline's name: the folder of a tiny one, saved on first use."""

    @functools.cache
    def save(name):
        if name in NEEDS_TORCHVISION and not TORCHVISION:
            pytest.skip(f"{name} needs torchvision")
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(name)
        MAKE[name]().save_pretrained(path)
        return path

    return save


def load(folder, name, guided=False):
    plain, guidance = CALLS[name]
    template = '{"edit_instruction": "{}"}' if name == "BriaFiboEditPipeline" else "{}"
    call = CALL | plain | (guidance if guided else {})
    torch.manual_seed(0)  # of the adapter's weights, whatever test ran before
    return Editor(Diffuser.load(folder(name)).pipeline, call, template=template)


@pytest.mark.parametrize("name", PIPELINES)
def test_edits_and_adapter(name, folder, tmp_path):
    editor = load(folder, name)
    images = noise_images(2)
    plain = editor.edit(images, INSTRUCTIONS, [1, 2])
    assert plain[0].size == (64, 64)
    assert difference(plain[:1], plain[1:]) > 1
    assert difference(plain[1:], editor.edit(images[1:], INSTRUCTIONS[1:], [2])) <= 1

    parameters = editor.add_adapter(4)
    assert bytes_of(editor.edit(images, INSTRUCTIONS, [1, 2])) == bytes_of(plain)
    disturb(parameters)
    trained = editor.edit(images, INSTRUCTIONS, [1, 2])
    assert difference(trained, plain) > 1
    editor.save_adapter(tmp_path)
    for loads in (lambda new: new.load_adapter, lambda new: new.pipeline.load_lora_weights):
        new = load(folder, name)
        loads(new)(tmp_path)  # the second is of diffusers alone
        assert bytes_of(new.edit(images, INSTRUCTIONS, [1, 2])) == bytes_of(trained)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", PIPELINES)
def test_recorded_is_replayed_and_gradient_is_finite_difference(name, guided, folder):
    editor = load(folder, name, guided)
    parameters = editor.add_adapter(4)
    disturb(parameters)
    group = [noise_images(1) * 3, INSTRUCTIONS[:1] * 3, [5] * 3, [10, 11, 12]]
    with torch.no_grad():
        nearly_ode = editor.rollout(*group, range(3), 1e-4)
        rollout = editor.rollout(*group, range(1, 3), 0.8)
    assert difference(nearly_ode.images, editor.edit(*group[:3])) <= 1
    assert len(rollout.steps) == 2
    calls = len(rollout.steps[0].calls)
    assert calls == (1 if not guided or name == "BriaFiboEditPipeline" else 2)
    for step in rollout.steps:
        with editor.adapter(), torch.no_grad():
            log_prob, mean, _ = editor.replay(step)
            assert (log_prob - step.log_prob).abs().max() < 1e-6
            assert (mean - step.mean).abs().max() < 1e-5
        with torch.no_grad():  # without adapter it would have done something else
            assert (editor.replay(step)[1] - step.mean).abs().max() > 1e-3
    check_gradient(editor, group, rollout.steps[1], parameters)


def check_gradient(editor, group, step, parameters):
    """d log-prob / d LoRA weights, along the gradient and along two random directions.

    Measured with 6 random adapters each: errors of at most 0.0012 of the gradient's length, and of
    0.011 to 0.030 with a cache. A longer difference would add curvature, a shorter one rounding.
    """
    with editor.adapter():
        editor.replay(step)[0].sum().backward()
    gradient = [parameter.grad.clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(1)
    directions = [gradient]
    for _ in range(2):
        directions.append([torch.randn(p.shape, generator=generator) for p in parameters])
    for direction in directions:
        unit = [d / dot(direction, direction) ** 0.5 for d in direction]
        ahead = fresh_log_prob(editor, group, step, parameters, unit, 0.002)
        behind = fresh_log_prob(editor, group, step, parameters, unit, -0.002)
        error = (ahead - behind) / 0.004 - dot(gradient, unit)
        assert abs(error) < 0.002 * dot(gradient, gradient) ** 0.5


def dot(first, second):
    return sum((x * y).sum().item() for x, y in zip(first, second))


def fresh_log_prob(editor, group, step, parameters, direction, size):
    """The log-prob of the recorded x' given x, from a whole new run of the pipeline, summed.

    The LoRA weights are moved along `direction`. The steps before x are forced to the recorded x.
    """
    for parameter, d in zip(parameters, direction):
        parameter.data += size * d
    found = []

    def forced(velocity, sample, sigma, sigma_next, *more, **keywords):
        made = sde_step(velocity, sample, sigma, sigma_next, *more, **keywords)
        if sigma_next == step.sigma:
            return (step.sample, *made[1:])
        if sigma == step.sigma:
            error = (step.next_sample - made[2]).double() / made[3]
            found.append(-0.5 * error.square().flatten(1).mean(1).sum().item())
        return made

    with torch.no_grad(), mock.patch("editor.sde_step", forced):
        editor.rollout(*group, range(2, 3), 0.8)
    for parameter, d in zip(parameters, direction):
        parameter.data -= size * d
    return found[0]


def test_the_cache_of_qwen_image_21_would_make_the_gradient_wrong(folder):
    """What the table's `use_kv_cache: False` prevents, and proof that the check above notices."""
    editor = load(folder, "QwenImage21Pipeline")
    assert editor.call["use_kv_cache"] is False
    with pytest.raises(ValueError, match="'editor.call' has to hold.*use_kv_cache.*False"):
        Editor(editor.pipeline, {"use_kv_cache": True})
    parameters = editor.add_adapter(4)
    disturb(parameters)
    editor.call["use_kv_cache"] = True
    group = [noise_images(1) * 3, INSTRUCTIONS[:1] * 3, [5] * 3, [10, 11, 12]]
    with torch.no_grad():
        step = editor.rollout(*group, range(1, 3), 0.8).steps[1]
    with editor.adapter(), torch.no_grad():
        assert (editor.replay(step)[0] - step.log_prob).abs().max() < 1e-5  # looks right
    with pytest.raises(AssertionError):
        check_gradient(editor, group, step, parameters)


def test_pipelines_that_take_one_edit_a_call_say_so(folder):
    editor = load(folder, "Flux2KleinPipeline")
    with pytest.raises(ValueError, match="one image and one instruction per call"):
        editor.rollout(noise_images(2), INSTRUCTIONS, [5, 5], [1, 2], range(1), 0.8)
