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


# ---- what is refused, and what makes room ----


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
