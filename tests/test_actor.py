"""actor.py: the form of a completion, sampling, replay, and adapters, with the shipped tiny VLM."""

import json
import random
import shutil

import pytest
import torch
from conftest import ROOT, disturb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from actor import SYSTEM, TARGETS, Actor, parse_completion, request
from config import LoopConfig, load_config
from loop import build, sha256_sums
from sgiou import SceneGraph
from tiny import world

VLM = ROOT / "tiny" / "models" / "vlm"
PROMPT = "red circle left of blue square"


# ---- the form, without a model ----


def test_request():
    assert request(PROMPT, "") == f"Prompt: {PROMPT}. nothing is wrong."
    assert request(PROMPT, "missing: owl") == f"Prompt: {PROMPT}. missing: owl."
    assert request(PROMPT, "missing: owl", ["add an owl", "add owls"]) == (
        f"Prompt: {PROMPT}. missing: owl. Tried without success: add an owl; add owls."
    )


@pytest.mark.parametrize(
    ("text", "thought", "instruction"),
    [
        ("<think>a</think><edit>b</edit>", "a", "b"),
        (" <think> a\nb </think>\n\n<edit>\n move  the\tcup </edit>\n", "a\nb", "move the cup"),
        ("<think></think><edit> None. </edit>", "", "none"),
    ],
)
def test_well_formed_completions(text, thought, instruction):
    assert parse_completion(text) == (thought, instruction)


@pytest.mark.parametrize(
    "text",
    [
        "move the cup",
        "<edit>b</edit>",
        "<think>a</think><edit> \n </edit>",
        "Sure! <think>a</think><edit>b</edit>",
        "<think>a</think><edit>b</edit><edit>c</edit>",
    ],
)
def test_malformed_completions(text):
    assert parse_completion(text) == (text.strip(), None)


tags = st.sampled_from(["<think>", "</think>", "<edit>", "</edit>", "a", " ", "\n", "<", "none"])


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(tags, max_size=8).map("".join))
def test_any_completion_parses(text):
    thought, instruction = parse_completion(text)
    assert isinstance(thought, str)
    if instruction is not None:
        assert instruction == " ".join(instruction.split()) != ""
        assert "<" not in instruction + thought
        assert instruction in " ".join(text.split())
        assert text.strip().startswith("<think>") and text.strip().endswith("</edit>")


# ---- sampling ----


def load(**settings):
    return Actor.load(VLM, **{"max_new_tokens": 64} | settings)


@pytest.fixture(scope="module")
def actor():
    return load()


@pytest.fixture(scope="module")
def states():
    """(images, prompts, feedback) of 21 images that do not show what their prompt says."""
    rng = random.Random(0)
    images, prompts, feedback = [], [], []
    for _ in range(21):
        _, triples = world.random_prompt(rng, 3)
        images.append(Image.fromarray(world.render(world.random_scene(rng, 3))))
        prompts.append(SceneGraph((), triples).prompt())
        feedback.append("wrong: " + "; ".join(" ".join(triple) for triple in triples))
    return images, prompts, feedback


def first(states, count):
    return [part[:count] for part in states]


def test_completions_are_instructions(actor, states):
    proposals = actor.propose(*states, seeds=range(21))
    assert sum(instruction is not None for instruction in proposals.instructions) >= 18
    assert sum(proposals.truncated) <= 2


def test_several_completions_of_an_image_are_neighbors(actor, states):
    images, prompts, feedback = states = first(states, 2)
    tried = [[], ["add a red circle", "swap them"]]
    proposals = actor.propose(*states, seeds=[0, 1], n=2, tried=tried)
    assert proposals.images == [images[0], images[0], images[1], images[1]]
    assert proposals.requests[2] == request(prompts[1], feedback[1], tried[1])


def completion(proposals, row):
    return proposals.ids[row][proposals.mask[row]].tolist()


def test_a_completion_depends_on_its_own_seed_alone(states):
    """Alone, among 20 others, in other batches, and with more samples: the same ids.

    The global random state is neither used nor changed.
    """
    state = torch.get_rng_state()
    among = load().propose(*states, seeds=range(21))
    small_batches = load(batch_size=4).propose(*states, seeds=range(21), n=2)
    for row in (0, 20):
        image = [part[row : row + 1] for part in states]
        alone = completion(load().propose(*image, seeds=[row]), 0)
        assert alone == completion(among, row) == completion(small_batches, 2 * row)
        assert alone != completion(small_batches, 2 * row + 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_drawn_from_the_softmax_at_the_temperature(actor, states):
    """The first token of 1,000 completions against the distribution of one forward pass."""
    image, prompt, feedback = first(states, 1)
    hot = load(max_new_tokens=1, temperature=4.0, batch_size=1)
    ids = hot.propose(image, prompt, feedback, seeds=[3], n=1000).ids[:, 0]
    inputs = hot.inputs(SYSTEM, image, [request(prompt[0], feedback[0])])
    with torch.no_grad():
        probs = (hot.model(**inputs).logits[0, -1] / 4.0).softmax(-1)
    found = ids.bincount(minlength=len(probs)) / 1000
    chi_square = 1000 * ((found - probs) ** 2 / probs).sum()  # mean V - 1 = 92, std 14
    assert chi_square < 92 + 5 * 14
    wrong = probs.flip(0)
    assert 1000 * ((found - wrong) ** 2 / wrong).sum() > 1000  # the test has power


# ---- replay ----


def test_sampling_and_replay_equal_a_loop_over_tokens(states):
    """An independent reference: one forward pass per token, no padding, no cache."""
    actor = load(temperature=0.7)
    proposals = actor.propose(*first(states, 2), seeds=[0, 1])
    with torch.no_grad():
        replayed = actor.replay(proposals, slice(None))
    for row in range(2):
        inputs = actor.inputs(SYSTEM, [proposals.images[row]], [proposals.requests[row]])
        ids = inputs["input_ids"]
        for position, token in enumerate(completion(proposals, row)):
            with torch.no_grad():
                logits = actor.model(
                    input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False
                ).logits
            expected = (logits[0, -1].double() / 0.7).log_softmax(-1)[token].item()
            assert proposals.log_probs[row, position].item() == pytest.approx(expected, abs=1e-4)
            assert replayed[row, position].item() == pytest.approx(expected, abs=1e-4)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_a_folders_sampling_defaults_are_dropped(states):
    """A repetition penalty would change what is sampled and would not be seen in the replay."""
    plain = load().propose(*first(states, 3), seeds=range(3)).ids
    actor = load()
    actor.model.generation_config.update(top_k=1, repetition_penalty=3.0, min_new_tokens=60)
    again = Actor(actor.model, actor.processor, max_new_tokens=64)
    assert torch.equal(again.propose(*first(states, 3), seeds=range(3)).ids, plain)


@pytest.mark.parametrize(
    ("end", "message"),
    [(None, "no eos_token_id"), (10**5, "not in the voc"), ([], "not in"), ("1", "not in")],
)
def test_a_model_without_an_end_token_is_refused(actor, end, message):
    model = load().model
    model.generation_config.eos_token_id = end
    with pytest.raises(ValueError, match=message):
        Actor(model, actor.processor)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_template_that_drops_the_prompt_is_refused(checkpointing):
    actor = load(checkpointing=checkpointing)
    actor.processor.chat_template = "<image> <answer>"
    with pytest.raises(ValueError, match="drops the text of the message"):
        actor.probe()


def test_a_model_that_answers_nan_is_refused(states):
    actor = load(temperature=1e-40)
    with pytest.raises(ValueError, match="logits are NaN: .*temperature is too small"):
        actor.propose(*first(states, 1), seeds=[0])


def test_truncated_completions_are_counted(states):
    proposals = load(max_new_tokens=3).propose(*first(states, 4), seeds=range(4))
    assert proposals.truncated == [True] * 4 and proposals.instructions == [None] * 4
    assert proposals.mask.all()


# ---- adapters ----


def trained(rank=4, **settings):
    """An Actor whose adapter does something."""
    actor = load(**settings)
    disturb(actor.add_adapter(rank), 0.05)
    return actor


def scores(actor, proposals):
    with actor.adapter(), torch.no_grad():
        return actor.replay(proposals, slice(None))


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
    """(folder of an adapter, proposals, their log-probs with it)."""
    folder = tmp_path_factory.mktemp("adapter")
    actor = trained()
    actor.save_adapter(folder)
    proposals = actor.propose(*first(states, 3), seeds=range(3))
    return folder, proposals, scores(actor, proposals)


def test_the_adapter_is_active_inside_its_block_only(states):
    actor = trained()
    proposals = actor.propose(*first(states, 2), seeds=[0, 1])

    def fail(*_):
        raise RuntimeError("in the middle of a rollout")

    with torch.no_grad():
        base = actor.replay(proposals, slice(None))
    hook = actor.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="middle"):
        actor.propose(*first(states, 2), seeds=[0, 1])
    hook.remove()
    with torch.no_grad():
        assert torch.equal(actor.replay(proposals, slice(None)), base)
    untrained = actor.without_adapter()
    assert torch.equal(scores(untrained, proposals), base)
    assert not torch.equal(scores(actor, proposals), base)


def test_training_continues_with_the_adapter_that_is_there(saved):
    """One that was loaded, or that an earlier training in the same notebook left."""
    folder, proposals, expected = saved
    actor = load()
    actor.load_adapter(folder)
    with pytest.raises(ValueError, match="has rank 4; set rank=4"):
        actor.add_adapter(99)
    parameters = actor.add_adapter(4)
    assert torch.equal(scores(actor, proposals), expected)
    with actor.adapter():
        actor.replay(proposals, slice(None)).sum().backward()
    assert sum(p.grad is not None for p in actor.model.parameters()) == len(parameters)
    assert [id(p) for p in actor.add_adapter(4)] == [id(p) for p in parameters]


def test_an_adapter_stays_in_fp32_in_a_bf16_model(saved):
    folder, *_ = saved
    actor = load(dtype="bfloat16")
    actor.load_adapter(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {n: p for n, p in actor.model.named_parameters() if ".actor." in n}
    assert len(found) == len(tensors)
    for name, parameter in found.items():
        assert torch.equal(parameter, tensors[f"base_model.model.{name.replace('.actor.', '.')}"])


def edited(saved, folder, change=lambda tensors: tensors, **config):
    """The saved adapter with other tensors or another config, as other programs could write it."""
    shutil.copytree(saved[0], folder)
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda tensors: {n: t for n, t in tensors.items() if "0.mlp.up_proj.lora_B" not in n},
            {},
            "missing, unknown, or not finite: .*up_proj.lora_B",
        ),
        (
            lambda tensors: {n.replace("lora_A", "lora_C"): t for n, t in tensors.items()},
            {},
            "missing, unknown, or not finite: .*lora_A",
        ),
        (lambda tensors: tensors | {"surplus.weight": torch.zeros(1)}, {}, "not finite: surplus"),
        (lambda tensors: {n: t.to(torch.int8) for n, t in tensors.items()}, {}, "not finite: "),
        (
            lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.zeros(99, 128)},
            {},
            "not finite: lm_head.weight",
        ),
        (dict, {"r": 8}, "size mismatch"),
        (dict, {"init_lora_weights": "pissa"}, "'pissa' is not a plain LoRA"),
        (dict, {"bias": "all"}, "changes biases of the base model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(saved, tmp_path, change, config, message):
    folder = edited(saved, tmp_path / "adapter", change, **config)
    actor = load()
    head = actor.model.lm_head.weight.clone()
    with pytest.raises(ValueError, match=f"(?s)no adapter of this Actor: .*{message}"):
        actor.load_adapter(folder)
    assert torch.equal(actor.model.lm_head.weight, head)


def test_another_lora_alpha_is_seen_by_its_checksum(saved, tmp_path, monkeypatch):
    """A LoRA may have any alpha, so only the checksums that train.py writes can tell."""
    monkeypatch.chdir(ROOT)
    folder = shutil.copytree(saved[0], tmp_path / "adapter")
    (folder / "SHA256SUMS").write_text(sha256_sums(folder))
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 400'))
    with pytest.raises(ValueError, match="key 'actor.adapter'.*SHA256SUMS"):
        build(load_config("eval.yaml", LoopConfig, [f"actor.adapter={folder}"]))


def test_an_adapter_with_whole_modules(tmp_path):
    """peft's `modules_to_save`, as `PeftModel.save_pretrained` writes it."""
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": TARGETS, "modules_to_save": ["lm_head", "norm"]}
    model = get_peft_model(load().model, LoraConfig(r=4, **settings))
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    head.data += 1
    model.save_pretrained(tmp_path)
    actor = load()
    actor.load_adapter(tmp_path)
    hidden = torch.randn(2, 128)
    base = actor.model.lm_head(hidden)
    with actor.adapter():
        torch.testing.assert_close(actor.model.lm_head(hidden), hidden @ head.T)
    assert torch.equal(actor.model.lm_head(hidden), base)
    with pytest.raises(ValueError, match="whole modules, which needs actor.dtype: float32"):
        load(dtype="bfloat16").load_adapter(tmp_path)


def test_an_adapter_of_embeddings_and_one_of_new_tokens(tmp_path):
    """With the embeddings, peft saves copies of the base model's."""
    from peft import LoraConfig, get_peft_model

    embeddings = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}}
    for name, chosen in (("embeddings", embeddings), ("tokens", tokens)):
        model = get_peft_model(load().model, LoraConfig(r=4, **chosen))
        disturb([p for p in model.parameters() if p.requires_grad])
        model.save_pretrained(tmp_path / name)
        ids = torch.tensor([[3, 4, 5]])
        expected = model(input_ids=ids).logits
        actor = load()
        actor.load_adapter(tmp_path / name)
        with actor.adapter():
            torch.testing.assert_close(actor.model(input_ids=ids).logits, expected)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(p.numel() for p in actor.add_adapter(4)) == count


def test_adapters_of_other_programs(saved, tmp_path):
    """With another scale, `.alpha` tensors, which repeat the config, and a copy of the head."""
    _, proposals, expected = saved
    more = {"base_model.model.model.language_model.layers.0.mlp.up_proj.alpha": torch.ones(1)}
    more["base_model.model.lm_head.weight"] = load().model.lm_head.weight.data.clone()
    for scale in (4, 8):
        actor, folder = load(), tmp_path / str(scale)
        actor.load_adapter(edited(saved, folder, lambda tensors: tensors | more, lora_alpha=scale))
        assert torch.equal(scores(actor, proposals), expected) == (scale == 4)


# ---- templates ----


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("<think>", "why</think><edit>add sun</edit>"),
        ("<think>\n\n</think>\n", "<edit>add sun</edit>"),
    ],
)
def test_tags_that_the_template_gives_need_not_be_repeated(
    states, tmp_path, monkeypatch, given, text
):
    folder = shutil.copytree(VLM, tmp_path / "vlm")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + given)
    actor = Actor.load(folder, max_new_tokens=2)
    written = [text, "<think>why</think><edit>add sun</edit>"]
    monkeypatch.setattr(type(actor.processor), "batch_decode", lambda *_, **__: written)
    assert actor.propose(*first(states, 2), seeds=[0, 1]).instructions == ["add sun"] * 2


def test_a_tag_that_the_template_gives_is_part_of_the_completion(actor, states, tmp_path):
    folder = tmp_path / "vlm"
    shutil.copytree(VLM, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "<think>")
    thinking = Actor.load(folder, max_new_tokens=64)
    proposals = thinking.propose(*states, seeds=range(21))
    completions = thinking.processor.batch_decode(proposals.ids, skip_special_tokens=True)
    assert not any(text.strip().startswith("<think>") for text in completions)
    assert sum(instruction is not None for instruction in proposals.instructions) >= 18


@pytest.mark.parametrize("tag", ["<think>", "</edit>"])
def test_a_tokenizer_that_loses_the_tags_is_refused(tmp_path, tag):
    folder = tmp_path / "vlm"
    shutil.copytree(VLM, folder)
    path = folder / "tokenizer.json"
    contents = json.loads(path.read_text())
    token = {"id": contents["model"]["vocab"][tag], "content": tag}
    contents["added_tokens"].append(contents["added_tokens"][0] | token)  # a special token, too
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=f"tokenizer has {tag} as a special"):
        Actor.load(folder).probe()


# ---- activation checkpointing ----


def test_checkpointing_changes_no_gradient(saved):
    folder, proposals, _ = saved
    gradients = []
    for recompute in (False, True):
        actor = load(checkpointing=recompute)
        actor.load_adapter(folder)
        parameters = actor.add_adapter(4)
        entered = []
        layer = actor.model.model.language_model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_: entered.append(torch.is_grad_enabled()))  # noqa: B023
        with actor.adapter():
            actor.replay(proposals, slice(None)).sum().backward()
        assert len(entered) == 1 + recompute  # once forward, once more in backward
        gradients.append([parameter.grad for parameter in parameters])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
