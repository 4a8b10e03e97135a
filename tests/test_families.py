"""Every model family through the whole path, by tiny random models of the real classes.

Load, generate or edit, record, replay at rho = 1, one update, save the adapter, reload it in peft
or diffusers with identical output. Nothing is downloaded.
"""

import importlib.util
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "gpu"))

import architectures  # noqa: E402
from memory import checkpoint_vlm, take_turns  # noqa: E402
from phases import ActorPhase, Batch, EditorPhase, State  # noqa: E402
from rollout import find_mixture, mix  # noqa: E402

from actor import Actor  # noqa: E402
from checker import Checker, reflect  # noqa: E402
from config import LoopConfig, load_config  # noqa: E402
from diffuser import Diffuser  # noqa: E402
from editor import Editor  # noqa: E402
from loop import build  # noqa: E402
from sgiou import SceneGraph  # noqa: E402
from train import update  # noqa: E402

TORCHVISION = importlib.util.find_spec("torchvision") is not None
if not TORCHVISION:
    warnings.warn("no torchvision: Qwen-VL's own processors are not tested", stacklevel=1)
needs_torchvision = pytest.mark.skipif(not TORCHVISION, reason="Qwen-VL needs torchvision")

GRAPH = SceneGraph(("red circle", "blue square"), (("red circle", "left of", "blue square"),))
SMALL = architectures.SIZES["tiny"]["Qwen3ForCausalLM"]  # any language model
TEXTS = ["move the red circle left of the blue square", "move the blue square"]
UPDATE = SimpleNamespace(
    group_size=3,
    window=1,
    window_start=0,
    micro_batch=3,
    advantage_eps=0.05,
    flat_range=0.02,
    updates=2,
    tolerance=1e-4,
    clip_low=0.2,
    clip_high=0.2,
    kl=0.01,
    max_grad_norm=1.0,
)


def pictures(count, size=32):
    noise = torch.randint(0, 256, (count, 4, 4, 3), generator=torch.Generator().manual_seed(0))
    small = [Image.fromarray(pixels.byte().numpy()) for pixels in noise]
    return [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in small]


def disturb(parameters, size):
    """Makes an untrained adapter, which changes nothing, one that does."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def bytes_of(images):
    return [image.tobytes() for image in images]


def difference(first, second):
    """The largest difference of two lists of pictures, in 1/255 per channel."""
    pairs = zip(map(bytes, bytes_of(first)), map(bytes, bytes_of(second)))
    return max(abs(x - y) for one, other in pairs for x, y in zip(one, other))


# ---- editors ----


def wan_vae(channels=4):
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )


def fibo_edit():
    """Guides on a batch twice as large; text encoder SmolLM3."""
    from diffusers import (
        BriaFiboEditPipeline,
        BriaFiboTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SMALL | {"num_hidden_layers": 2, "pad_token_id": 0, "vocab_size": 128256}
    return BriaFiboEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=wan_vae(),
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


def qwen_image_edit():
    """Guides by two calls, and gives the mixture the length of the guided answer."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageEditPipeline,
        QwenImageTransformer2DModel,
    )

    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    text_encoder, processor = qwen_vl("Qwen2_5_VLForConditionalGeneration")
    return QwenImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )


def qwen_vl(name):
    """A tiny Qwen-VL, with its own processor where torchvision lets it be built."""
    model, processor = architectures.qwen_vl(name, tiny=True)
    if TORCHVISION:
        import transformers

        image_processor = transformers.Qwen2VLImageProcessor(
            patch_size=processor.image_processor.patch_size
        )
        kind = {"Qwen2_5_VL": "Qwen2_5_VLProcessor", "Qwen3VLFor": "Qwen3VLProcessor"}[name[:10]]
        video = "Qwen2VLVideoProcessor" if kind[4] == "2" else "Qwen3VLVideoProcessor"
        processor = getattr(transformers, kind)(
            image_processor=image_processor,
            tokenizer=processor.tokenizer,
            video_processor=getattr(transformers, video)(),
            chat_template=processor.tokenizer.chat_template,
        )
    return model, processor


KONTEXT = {"height": 32, "width": 32, "max_area": 1024, "_auto_resize": False}
KONTEXT |= {"num_inference_steps": 4, "max_sequence_length": 12}
EDITORS = {  # how it is made, pixels a side, arguments of its call, template
    "FluxKontext": (lambda: architectures.kontext(True), 32, KONTEXT, "{}"),
    "FluxKontext, guided": (
        lambda: architectures.kontext(True),
        32,
        KONTEXT | {"true_cfg_scale": 2.5, "negative_prompt": "red"},
        "{}",
    ),
    "Flux2Klein, guided": (
        lambda: architectures.klein(True),
        64,  # pixels, the least that it takes
        {"num_inference_steps": 4, "guidance_scale": 4.0, "max_sequence_length": 24}
        | {"text_encoder_out_layers": [1, 2, 3], "height": 64, "width": 64},
        "{}",
    ),
    "QwenImageEdit, guided": (
        qwen_image_edit,
        64,
        {"num_inference_steps": 4, "true_cfg_scale": 4.0, "negative_prompt": " "}
        | {"height": 64, "width": 64},
        "{}",
    ),
    "BriaFiboEdit, guided": (
        fibo_edit,
        64,
        {"num_inference_steps": 4, "guidance_scale": 5, "height": 64, "width": 64},
        '{"edit_instruction": "{}"}',
    ),
}


@pytest.mark.parametrize("name", EDITORS)
def test_editor(name, tmp_path, monkeypatch):
    make, size, call, template = EDITORS[name]
    module = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit"
    # One megapixel, which it edits at, takes too long for a test.
    monkeypatch.setattr(f"{module}.calculate_dimensions", lambda *_: (160, 160, None))

    def load():
        torch.manual_seed(0)
        pipeline = make()
        if "Qwen" in name and not TORCHVISION:  # with a processor that cannot be saved
            return Editor(pipeline, call, template=template)
        pipeline.save_pretrained(tmp_path / "model")
        return Editor.load(tmp_path / "model", "cpu", call=call, template=template)

    editor = load()
    images = pictures(2, size)
    plain = editor.edit(images, TEXTS, [1, 2])
    alone = [editor.edit([i], [t], [s])[0] for i, t, s in zip(images, TEXTS, [1, 2])]
    assert plain[0].size == (size, size)
    assert difference(plain, alone) <= 1
    parameters = editor.add_adapter(4)
    assert bytes_of(editor.edit(images, TEXTS, [1, 2])) == bytes_of(plain)
    disturb(parameters, 0.3)

    group = [images[:1] * 3, TEXTS[:1] * 3, [5] * 3, [10, 11, 12]]
    with torch.no_grad():
        ode = editor.rollout(*group, range(0), 0.0)
        rollout = editor.rollout(*group, range(1, 3), 0.8)
    assert difference(ode.images, editor.edit(*group[:3])) <= 1
    assert len(rollout.steps) == 2 and not ode.steps
    for step in rollout.steps:
        with editor.adapter(), torch.no_grad():
            assert (editor.log_probs(step)[0] - step.log_prob).abs().max() < 1e-5
        with torch.no_grad():
            assert (editor.log_probs(step)[0] - step.log_prob).abs().max() > 1e-4
    check_gradient(editor, rollout.steps[0], parameters)
    if "Kontext" not in name:
        with pytest.raises(ValueError, match="one picture by one instruction a call"):
            editor.rollout(images, TEXTS, [5, 5], [1, 2], range(1), 0.8)

    states = [State(GRAPH, images[0], None)] * 3
    batch = Batch([0.1, 0.5, 0.9], [0, 0, 0], rollout.images, [], states, [rollout], {})
    phase = EditorPhase(SimpleNamespace(actor=None, editor=editor), UPDATE)
    figures = update(phase, [batch], torch.optim.AdamW(parameters, 1e-3), parameters, UPDATE)
    assert figures["replay_error"] < 1e-5
    assert figures["grad_norm"] > 0 and figures["ratio_error"] > 0

    trained = editor.edit(images, TEXTS, [1, 2])
    assert difference(trained, plain) > 1
    editor.save_adapter(tmp_path / "adapter")
    fresh = load()
    fresh.load_adapter(tmp_path / "adapter")
    assert bytes_of(fresh.edit(images, TEXTS, [1, 2])) == bytes_of(trained)
    bare = load()
    bare.pipeline.load_lora_weights(tmp_path / "adapter")
    assert bytes_of(bare.edit(images, TEXTS, [1, 2])) == bytes_of(trained)


def check_gradient(editor, step, parameters):
    """Along its own direction a gradient equals the finite difference: no call was left out."""
    with editor.adapter():
        for parameter in parameters:
            parameter.grad = None
        editor.log_probs(step)[0].sum().backward()
    gradients = [parameter.grad for parameter in parameters]
    length = sum(gradient.square().sum() for gradient in gradients).sqrt()
    values = []
    for side in (0.02, -0.04):
        for parameter, gradient in zip(parameters, gradients):
            parameter.data += side * gradient / length
        with editor.adapter(), torch.no_grad():
            values.append(editor.log_probs(step)[0].sum())
    for parameter, gradient in zip(parameters, gradients):
        parameter.data += 0.02 * gradient / length
        parameter.grad = None
    assert (values[0] - values[1]) / 0.04 == pytest.approx(length.item(), rel=0.05)


# ---- VLMs ----


def gemma3():
    """Image tokens see one another, told by token types."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = ["image_token", "boi_token", "eoi_token"]
    special = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    tokenizer = architectures.tokenizer(
        special=special, image=special[1], extra_special_tokens=dict(zip(names, special))
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=4,
    )
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**SMALL, sliding_window=16),
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            vision_use_head=False,
        ),
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # was 0
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    return model, processor


def idefics3():
    """Pictures come in a further dimension, with a mask; the language model is a `text_model`."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
    )
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    tokenizer = architectures.tokenizer(special=special, image="<image>")
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_len=4,
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = Idefics3Config(
        text_config=SMALL | {"model_type": "llama", "pad_token_id": 0},
        vision_config=vision,
        image_token_id=3,
        scale_factor=2,
    )
    model = Idefics3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    return model, processor


VLMS = {
    "Idefics3": idefics3,
    "Gemma3": gemma3,
    "Qwen2.5-VL": lambda: qwen_vl("Qwen2_5_VLForConditionalGeneration"),
    "Qwen3-VL": lambda: qwen_vl("Qwen3VLForConditionalGeneration"),
}


@pytest.mark.parametrize("name", VLMS)
def test_vlm(name, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model, processor = VLMS[name]()
    model.save_pretrained(tmp_path / "model")
    if TORCHVISION or "Qwen" not in name:
        processor.save_pretrained(tmp_path / "model")
        checker = Checker.load(tmp_path / "model", "cpu")
    else:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
        checker = Checker(model, processor)
    images, graphs = pictures(2, 56), [GRAPH, GRAPH]
    before = checker.check(images, graphs)
    assert before[0].probs != before[1].probs  # it sees
    checker.batch_size = 1
    alone = checker.check(images[1:], graphs[1:])
    assert alone[0].probs == pytest.approx(before[1].probs, abs=1e-5)
    assert all(0 <= grade <= 1 for grade in checker.judge(images, ["red circle"] * 2))
    assert len(checker.extract(images, graphs, max_new_tokens=4)) == 2

    actor = Actor(checker.model, checker.processor, max_new_tokens=6)
    parameters = actor.add_adapter(4)
    assert not any("vis" in name for name, p in actor.model.named_parameters() if p.requires_grad)
    disturb(parameters, 0.3)
    reflections = [reflect(GRAPH, [0.4, 0.6, 0.2]), reflect(GRAPH, [0.1, 0.2, 0.2])]
    proposals = actor.propose(images, graphs, reflections, n=3, seed=1)
    assert len(set(proposals.prompts)) == 2
    for rows in (slice(0, 6), slice(2, 5)):
        mask, recorded = proposals.mask[rows], proposals.sampled_log_probs[rows]
        with actor.adapter(), torch.no_grad():
            error = (actor.log_probs(proposals, rows) - recorded)[mask].abs().max()
            assert error < 1e-4
        with torch.no_grad():
            assert (actor.log_probs(proposals, rows) - recorded)[mask].abs().max() > 1e-3

    ids = proposals.ids.clone()
    proposals.ids[0, 1] = actor.visual_ids[0]  # a sampled picture token is not shown a picture
    assert actor.log_probs(proposals, slice(0, 2)).isfinite().all()
    proposals.ids = ids

    states = [State(GRAPH, image, told) for image, told in zip(images, reflections)]
    rewards, groups = [0.1, 0.5, 0.9, 0.2, 0.1, 0.3], [0, 0, 0, 1, 1, 1]
    batch = Batch(rewards, groups, [], [], states, proposals, {})
    phase = ActorPhase(SimpleNamespace(actor=actor), UPDATE)
    figures = update(phase, [batch], torch.optim.AdamW(parameters, 1e-3), parameters, UPDATE)
    assert figures["replay_error"] < 1e-4
    assert figures["grad_norm"] > 0 and figures["ratio_error"] > 0
    checker.batch_size = 64
    assert checker.check(images, graphs) == before

    with actor.adapter(), torch.no_grad():
        trained = actor.log_probs(proposals, slice(None))
    actor.save_adapter(tmp_path / "adapter")
    fresh = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    actor.model = PeftModel.from_pretrained(fresh, tmp_path / "adapter").base_model.model.eval()
    with torch.no_grad():
        assert torch.equal(actor.log_probs(proposals, slice(None)), trained)


# ---- Diffusers that are not Editors ----


def test_z_image_generates(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=architectures.build("AutoencoderKL", tiny=True),
        text_encoder=architectures.build("Qwen3ForCausalLM", tiny=True).model,
        tokenizer=architectures.tokenizer(),
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 32, 32],
        ).eval(),
    )
    pipeline.save_pretrained(tmp_path)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
    call |= {"negative_prompt": "blue", "max_sequence_length": 16}
    diffuser = Diffuser.load(tmp_path, "cpu", call=call)
    assert diffuser.problem("red circle") is None
    assert "'purple'" in diffuser.problem("purple circle")
    images = diffuser.generate(["red circle", "blue square"], [1, 2])
    assert images[0].size == (32, 32) and images[0].tobytes() != images[1].tobytes()
    assert difference(images[1:], diffuser.generate(["blue square"], [2])) <= 1
    with pytest.raises(ValueError, match="ZImagePipeline .* takes no picture"):
        Editor.load(tmp_path)


# ---- what is refused, and what makes room ----


@pytest.mark.parametrize(
    "kind, scheduler, reason",
    [
        ("FluxPipeline", "FlowMatchEulerDiscreteScheduler", "takes no picture"),
        ("FluxKontextInpaintPipeline", "FlowMatchEulerDiscreteScheduler", "noised picture"),
        ("FluxKontextPipeline", "UniPCMultistepScheduler", "UniPCMultistepScheduler is not"),
        ("Flux2KleinKVPipeline", "FlowMatchEulerDiscreteScheduler", "share a cache"),
        ("LTXImageToVideoPipeline", "FlowMatchEulerDiscreteScheduler", "videos"),
        ("LongCatImageEditPipeline", "FlowMatchEulerDiscreteScheduler", "LoRA"),
        ("NoSuchPipeline", "FlowMatchEulerDiscreteScheduler", "has no NoSuchPipeline"),
    ],
)
def test_a_pipeline_that_cannot_be_trained_is_refused_by_its_index(
    kind, scheduler, reason, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    index = {"_class_name": kind, "scheduler": ["diffusers", scheduler], "transformer": []}
    (tmp_path / "model_index.json").write_text(json.dumps(index))  # and no weights at all
    with pytest.raises(ValueError, match=f"{kind}.*{reason}|{reason}"):
        Editor.load(tmp_path)
    config = load_config(ROOT / "eval.yaml", LoopConfig, [f"editor.model={tmp_path}"])
    with pytest.raises(ValueError, match=f"key 'editor.model': .*{reason}"):
        build(config)


@pytest.mark.skipif(TORCHVISION, reason="torchvision is there")
def test_a_processor_that_lacks_torchvision_is_told_before_any_weight_is_read(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    model, processor = architectures.qwen_vl("Qwen2_5_VLForConditionalGeneration", tiny=True)
    model.config.save_pretrained(tmp_path)  # and no weights
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    text = json.dumps({"processor_class": "Qwen2_5_VLProcessor"})
    (tmp_path / "processor_config.json").write_text(text)
    config = load_config(ROOT / "eval.yaml", LoopConfig, [f"actor.model={tmp_path}"])
    with pytest.raises(ValueError, match="key 'actor.model': .*[Tt]orchvision"):
        build(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to take turns on")
def test_turns_without_a_gpu_are_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="'offload': there is no CUDA GPU"):
        build(load_config("eval.yaml", LoopConfig, ["offload=true"]))


def test_mixtures_are_found_or_refused():
    first, second, third = torch.randn(3, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    assert find_mixture([first], first, 1e-4) == ([1.0], False)
    assert find_mixture([first], -first, 1e-4) == ([-1.0], False)
    three = mix([first, second, third], [2.0, -1.5, 0.5], False)
    assert find_mixture([first, second, third], three, 1e-4) == ([2.0, -1.5, 0.5], False)
    rescaled = mix([first, second], [4.0, -3.0], True)
    assert find_mixture([first, second], rescaled, 1e-4) == ([4.0, -3.0], True)
    weights, flag = find_mixture([first, second], rescaled.bfloat16().float(), 1.6e-2)
    assert flag and weights == pytest.approx([4.0, -3.0], abs=0.1)
    assert find_mixture([first, second], torch.maximum(first, second), 1e-4) is None


def gradients(parameters, loss):
    for parameter in parameters:
        parameter.grad = None
    loss.sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model, processor = qwen_vl("Qwen2_5_VLForConditionalGeneration")
    actor = Actor(model, processor, max_new_tokens=4)
    editor = Editor(architectures.kontext(tiny=True), KONTEXT)
    weights = [actor.add_adapter(4), editor.add_adapter(4)]
    for parameters in weights:
        disturb(parameters, 0.3)
    image = pictures(1, 32)
    reflection = reflect(GRAPH, [0.4, 0.6, 0.2])
    proposals = actor.propose(image, [GRAPH], [reflection], n=2)
    with torch.no_grad():
        step = editor.rollout(image * 2, TEXTS[:1] * 2, [5, 5], [1, 2], range(1, 2), 0.8).steps[0]

    def run():
        with actor.adapter():
            first = gradients(weights[0], actor.log_probs(proposals, slice(None)))
        with editor.adapter():
            return first, gradients(weights[1], editor.log_probs(step)[0])

    before = run()
    checkpoint_vlm(actor.model)
    editor.pipeline.transformer.enable_gradient_checkpointing()
    entered = []
    layer = actor.model.model.language_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: entered.append(torch.is_grad_enabled()))
    for one, other in zip(before, run()):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert len(entered) == 2  # once forward, once more in backward
    assert actor.propose(image, [GRAPH], [reflection], n=2).ids.equal(proposals.ids)  # cached


def test_models_take_turns(monkeypatch):
    """Where they are told to go: the GPU needs not exist for that."""
    torch.manual_seed(0)
    model, processor = qwen_vl("Qwen2_5_VLForConditionalGeneration")
    pipeline = architectures.kontext(tiny=True)
    parts = Diffuser(pipeline, KONTEXT), Checker(model, processor)
    parts += Actor(model, processor, max_new_tokens=4), Editor(pipeline, KONTEXT)
    diffuser, checker, actor, editor = parts
    place = {}

    everything = {"vae", "text_encoder", "text_encoder_2", "transformer"}

    def move(names, device):
        place.update(dict.fromkeys(names, device))

    for name in everything:
        monkeypatch.setattr(pipeline.components[name], "to", partial(move, [name]))
    monkeypatch.setattr(pipeline, "to", partial(move, everything))
    monkeypatch.setattr(model, "to", partial(move, ["vlm"]))
    take_turns(parts, "gpu")

    def here():
        return {name for name, device in place.items() if device == "gpu"}

    images = diffuser.generate(["red circle"], [1])
    assert here() == everything
    reflections = checker.check(images, [GRAPH])
    assert here() == {"vlm"}
    actor.propose(images, [GRAPH], reflections)
    assert here() == {"vlm"}
    editor.add_adapter(4)
    assert here() == {"transformer"}
    with torch.no_grad():
        step = editor.rollout(images * 2, TEXTS[:1] * 2, [5, 5], [1, 2], range(1, 2), 0.8).steps[0]
    assert here() == everything
    with editor.adapter():
        editor.log_probs(step)
    assert here() == {"transformer"}
