"""Checker and Actor with every VLM family: tiny random models of the real classes, no download.

Qwen's own processors need torchvision. Without it a stand-in takes their place, and this says so.
"""

import copy
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import disturb
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "gpu"))

import architectures  # noqa: E402

import checker as checker_module  # noqa: E402
from actor import Actor  # noqa: E402
from checker import Checker  # noqa: E402
from sgiou import SceneGraph  # noqa: E402

TORCHVISION = importlib.util.find_spec("torchvision") is not None
if not TORCHVISION:
    warnings.warn("no torchvision: Qwen-VL's own processors are not tested", stacklevel=1)

SMALL = architectures.SIZES["tiny"]["Qwen3ForCausalLM"]  # any language model
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
GRAPHS = [  # of different numbers and lengths of questions; the stand-ins know some of the words
    SceneGraph(["a red circle", "a blue square"], [("a red circle", "left of", "a blue square")]),
    SceneGraph(["a red circle"], []),
    SceneGraph(["a blue circle", "red", "circle"], [("red", "right", "a blue circle")]),
]


def images(count=3):
    """Images of noise, of different sizes."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 4, 4, 3), generator=generator).byte().numpy()
    sizes = [(56, 56), (84, 56), (56, 112)]
    return [
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        for pixels, size in zip(noise, sizes)
    ]


# ---- the families ----


def llava():
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = architectures.tokenizer(special=["<image>"], image="<image>")
    size = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        text_config=SMALL | {"model_type": "llama", "pad_token_id": 0},
        vision_config=CLIPVisionConfig(**VISION),
        image_token_index=3,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), processor


def gemma3():
    """Image tokens see one another, told by token types; layers with a sliding window."""
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
        text_config=Gemma3TextConfig(**SMALL, sliding_window=128),
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # was 0
    return model, processor


def idefics3():
    """SmolVLM's architecture. Images come in a further dimension, with a mask, in tiles."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
    )
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = architectures.tokenizer(special=special, image="<image>")
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_len=4,
    )
    config = Idefics3Config(
        text_config=SMALL | {"model_type": "llama", "pad_token_id": 0},
        vision_config=VISION,
        image_token_id=3,
        scale_factor=2,
    )
    return Idefics3ForConditionalGeneration(config), processor


def qwen_vl(name):
    """A Qwen-VL with its own processor where torchvision lets it be built."""
    model, processor = architectures.qwen_vl(name, tiny=True)
    if TORCHVISION:
        import transformers

        kind = {"Qwen2_5_VL": "Qwen2_5_VLProcessor", "Qwen3VLFor": "Qwen3VLProcessor"}[name[:10]]
        video = "Qwen2VLVideoProcessor" if kind[4] == "2" else "Qwen3VLVideoProcessor"
        patch_size = processor.image_processor.patch_size
        processor = getattr(transformers, kind)(
            image_processor=transformers.Qwen2VLImageProcessor(patch_size=patch_size),
            tokenizer=processor.tokenizer,
            video_processor=getattr(transformers, video)(),
            chat_template=processor.tokenizer.chat_template,
        )
    return model, processor


def qwen3_5():
    """Linear attention in three layers of four; Qwen3-VL's processor."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    _, processor = qwen_vl("Qwen3VLForConditionalGeneration")
    text = SMALL | {"num_hidden_layers": 4, "partial_rotary_factor": 1.0}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 3, 3],
    }
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    vision = architectures.SIZES["tiny"]["Qwen3VLForConditionalGeneration"]["vision_config"]
    vision = {k: v for k, v in vision.items() if k != "deepstack_visual_indexes"}
    config = Qwen3_5Config(
        text_config=text | linear, vision_config=vision, **architectures.VISION_IDS
    )
    return Qwen3_5ForConditionalGeneration(config), processor


FAMILIES = {
    "LLaVA": llava,
    "Idefics3": idefics3,
    "Gemma3": gemma3,
    "Qwen2.5-VL": lambda: qwen_vl("Qwen2_5_VLForConditionalGeneration"),
    "Qwen3-VL": lambda: qwen_vl("Qwen3VLForConditionalGeneration"),
    "Qwen3.5": qwen3_5,
}


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request, tmp_path_factory):
    """(model, processor, folder), saved and loaded again where the processor can be saved."""
    torch.manual_seed(0)
    model, processor = FAMILIES[request.param]()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    folder = tmp_path_factory.mktemp("family") / "model"
    model.save_pretrained(folder)
    # Qwen3.5's tokenizer class would replace our word-level stand-in when it is loaded.
    if "Qwen" not in request.param or (TORCHVISION and request.param != "Qwen3.5"):
        processor.save_pretrained(folder)
        loaded = Checker.load(folder)
        model, processor = loaded.model, loaded.processor
    return model.eval(), processor, folder


# ---- Checker ----


def close(reflections, others):
    probs = [[p for reflection in side for p in reflection.probs] for side in (reflections, others)]
    return probs[0] == pytest.approx(probs[1], abs=1e-5)


def cannot_share(model):
    """The state of linear attention cannot be copied for every tail."""
    return hasattr(model.config.text_config, "linear_key_head_dim")


def test_one_encoding_of_an_image_answers_all_questions_as_one_each(vlm, monkeypatch, caplog):
    monkeypatch.setattr(checker_module, "LEAST_MASS", 0.0)  # the weights are random
    checker = Checker(*vlm[:2])
    single = checker.check(images(), GRAPHS)
    assert len({round(p, 6) for reflection in single for p in reflection.probs}) > 6  # it sees
    checker.probe()
    if cannot_share(vlm[0]):
        assert not checker.share
        assert "every text encodes its image anew" in caplog.text
        return
    assert checker.share
    monkeypatch.setattr(checker, "single_logits", None)  # so that it cannot be what answers
    passes = []
    hook = vlm[0].register_forward_pre_hook(
        lambda _, positional, named: passes.append("pixel_values" in named), with_kwargs=True
    )
    shared = checker.check(images(), GRAPHS)
    hook.remove()
    assert passes == [True, False]  # images once, questions once
    assert close(shared, single)
    for batch_size in (1, 2, 5):  # questions of an image fall into different batches
        checker.batch_size = batch_size
        assert close(checker.check(images(), GRAPHS), single)


@pytest.mark.parametrize("window", [32, 64])
def test_questions_longer_than_a_sliding_window(window, monkeypatch):
    """Padding between the shared part and a question would count in the window."""
    monkeypatch.setattr(checker_module, "LEAST_MASS", 0.0)
    model, processor = gemma3()
    model.config.text_config.sliding_window = window
    model = type(model)(model.config).eval()
    checker = Checker(model, processor)
    name = "red circle " * 20
    graphs = [SceneGraph([name, "blue square"], [(name, "left of", "blue square")])]
    single = checker.check(images(1), graphs)
    checker.share = True
    assert close(checker.check(images(1), graphs), single)


def test_a_wrong_answer_is_not_taken_for_rounding_in_bf16(vlm, monkeypatch):
    monkeypatch.setattr(checker_module, "LEAST_MASS", 0.0)
    checker = Checker(copy.deepcopy(vlm[0]).to(torch.bfloat16), vlm[1])
    single = checker.single_logits
    monkeypatch.setattr(checker, "shared_logits", lambda *rows: single(*rows).roll(1, 0))
    checker.probe()
    assert not checker.share


def test_a_reflection_does_not_depend_on_its_neighbors(vlm):
    checker = Checker(*vlm[:2])
    together = checker.check(images(), GRAPHS)
    for number in range(3):
        alone = checker.check(images()[number : number + 1], GRAPHS[number : number + 1])
        assert close(alone, together[number : number + 1])


# ---- Actor ----

PROMPTS = ["red circle left of blue square", "red", "blue circle right of red square"]
FEEDBACK = ["missing: red circle", "", "wrong: blue circle"]


@pytest.fixture
def actor(vlm):
    """An Actor with an adapter that does something, on the family's model."""
    actor = Actor(*vlm[:2], max_new_tokens=6)
    actor.probe()
    disturb(actor.add_adapter(4), 0.3)
    yield actor
    vlm[0].delete_adapter("actor")


def test_the_adapter_leaves_the_vision_tower_alone(actor):
    trained = [name for name, p in actor.model.named_parameters() if ".actor." in name]
    assert trained and not any("vis" in name for name in trained)
    kinds = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    if any(name.endswith("linear_attn") for name, _ in actor.model.named_modules()):
        kinds += ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
    assert all(any(f"{kind}.lora_A" in name for name in trained) for kind in kinds)


def test_replay_gives_the_recorded_log_probs(actor):
    proposals = actor.propose(images(), PROMPTS, FEEDBACK, seeds=[5, 6, 7], n=2)
    assert len(set(proposals.requests)) == 3
    for rows in (slice(0, 6), slice(1, 4)):
        mask, recorded = proposals.mask[rows], proposals.log_probs[rows]
        with actor.adapter(), torch.no_grad():
            assert (actor.replay(proposals, rows) - recorded)[mask].abs().max() < 1e-4
        with torch.no_grad():  # without the adapter it is another policy
            assert (actor.replay(proposals, rows) - recorded)[mask].abs().max() > 1e-3


def test_one_reading_of_a_request_gives_the_gradient_of_one_each(actor, caplog):
    if cannot_share(actor.model):
        assert not actor.share
        return
    assert actor.share and not caplog.text
    proposals = actor.propose(images(), PROMPTS, FEEDBACK, seeds=[5, 6, 7], n=3)
    parameters = actor.add_adapter(4)
    weight = torch.randn(proposals.mask.shape)
    found = []
    for actor.share in (False, True):
        passes = []
        hook = actor.model.register_forward_pre_hook(
            lambda *_, passes=passes, **__: passes.append(1), with_kwargs=True
        )
        with actor.adapter():
            log_probs = actor.replay(proposals, slice(1, 9))
            (log_probs * (weight * proposals.mask)[1:9]).sum().backward()
        hook.remove()
        assert len(passes) == 1 + actor.share
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
        for p in parameters:
            p.grad = None
    assert found[0].norm() > 0.1
    assert (found[0] - found[1]).norm() < 1e-4 * found[0].norm()


def test_a_sampled_image_token_is_not_shown_an_image(actor):
    proposals = actor.propose(images()[:1], PROMPTS[:1], FEEDBACK[:1], seeds=[5])
    image_token = actor.model.config.image_token_id
    assert image_token in actor.end_ids
    proposals.ids[0, 1] = image_token
    with torch.no_grad():
        assert actor.replay(proposals, slice(0, 1)).isfinite().all()


def test_every_parameter_of_the_adapter_learns_and_the_checker_is_spared(actor):
    checker = Checker(actor.model, actor.processor)
    before = checker.check(images(), GRAPHS)
    proposals = actor.propose(images()[:1], PROMPTS[:1], FEEDBACK[:1], seeds=[5])
    parameters = actor.add_adapter(4)  # those of the adapter that is there
    with actor.adapter():
        actor.replay(proposals, slice(None)).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    torch.optim.SGD(parameters, 0.03).step()
    assert checker.check(images(), GRAPHS) == before


def test_a_saved_adapter_loads_in_peft_and_here(actor, vlm, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    actor.share = False  # as in an Actor that was not probed
    proposals = actor.propose(images()[:2], PROMPTS[:2], FEEDBACK[:2], seeds=[5, 6])
    with actor.adapter(), torch.no_grad():
        expected = actor.replay(proposals, slice(None))
    actor.save_adapter(tmp_path)

    def fresh():
        model = AutoModelForImageTextToText.from_pretrained(vlm[2], dtype=torch.float32)
        return Actor(model, actor.processor)

    ours = fresh()
    ours.load_adapter(tmp_path)
    with ours.adapter(), torch.no_grad():
        assert torch.equal(ours.replay(proposals, slice(None)), expected)
    theirs = fresh()
    theirs.model = PeftModel.from_pretrained(theirs.model, tmp_path).base_model.model.eval()
    with torch.no_grad():
        assert torch.equal(theirs.replay(proposals, slice(None)), expected)
