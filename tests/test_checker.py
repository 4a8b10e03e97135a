"""checker.py: questions and score, the words yes and no, and the shipped tiny VLM as Checker."""

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checker import OPEN_THOUGHT, Checker, questions, reflect
from sgiou import SceneGraph
from tiny import world

VLM = Path(__file__).resolve().parent.parent / "tiny" / "models" / "vlm"

GRAPH = SceneGraph(
    ["red circle", "blue square", "owl", "sun"],
    [("red circle", "left of", "blue square"), ("owl", "above", "red circle")],
)


# ---- questions and score, without a model ----


def test_questions():
    assert questions(GRAPH) == [
        'Does the image show "red circle"?',
        'Does the image show "blue square"?',
        'Does the image show "owl"?',
        'Does the image show "sun"?',
        'Does the image show "red circle left of blue square"?',
        'Does the image show "owl above red circle"?',
    ]


def test_score_and_feedback_by_hand():
    reflection = reflect(GRAPH, [0.9, 0.3, 0.6, 0.4, 0.2, 0.5])
    assert reflection.score == pytest.approx((0.2 + 0.5 + 0.4) / 3)  # triples, and the sun
    assert reflection.feedback == "missing: blue square, sun. wrong: red circle left of blue square"
    assert not reflection.satisfied
    alone = SceneGraph(["red circle", "blue square"], [])
    assert reflect(alone, [0.9, 0.3]).score == pytest.approx(0.6)
    dogs = SceneGraph(["dog", "dog", "cat"], [("dog", "near", "cat")])
    assert reflect(dogs, [1, 0.25, 0, 0.5]).score == pytest.approx((0.5 + 0.25) / 2)


def test_a_half_is_enough():
    reflection = reflect(GRAPH, torch.full((6,), 0.5))  # an own reward may give tensors
    assert reflection.satisfied and reflection.feedback == "" and reflection.score == 0.5
    assert json.dumps(reflection.probs) == str([0.5] * 6)
    assert not reflect(GRAPH, [1, 1, 1, 1, 1, 0.4999]).satisfied


@pytest.mark.parametrize("probs", [[], [0.5] * 5, [0.5] * 5 + [math.nan], [0.5] * 5 + [1.5]])
def test_anything_but_a_probability_for_each_question_is_refused(probs):
    with pytest.raises(ValueError, match="give 6 probabilities|have to be 0 to 1"):
        reflect(GRAPH, probs)


def test_a_graph_without_objects_is_refused():
    with pytest.raises(ValueError, match="nothing to ask"):
        reflect(SceneGraph([], []), [])


# ---- which tokens mean yes and no ----


def tokenizer(words, family):
    """A tokenizer of words, in which ▁ is a space, with the decoder that the family has."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family == "Llama":  # drops the space before the first word
        steps.append(decoders.Strip(" ", 1, 0))
    if family == "Qwen":
        tokens = [token.replace("▁", "Ġ") for token in tokens]
        steps = [decoders.ByteLevel()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    fast = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    fast.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>")


def spelled(tokenizer, *words):
    """The tokens that `Checker.token_ids` finds for each word, with ▁ for a space."""
    vlm = SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer))
    found = [tokenizer.convert_ids_to_tokens(ids) for ids in Checker.token_ids(vlm, *words)]
    return [{token.replace("Ġ", "▁") for token in tokens} for tokens in found]


WORDS = "▁yes yes ▁Yes Yes ▁YES YES yesterday ▁no no ▁No No ▁NO NO ▁not nothing 0".split()


@pytest.mark.parametrize("family", ["Llama", "Gemma", "Qwen"])
def test_all_spellings_of_yes_and_no_are_found(family):
    words = tokenizer(WORDS, family)
    yes, no = spelled(words, "yes", "no")
    assert yes == {"▁yes", "yes", "▁Yes", "Yes", "▁YES", "YES"}
    assert no == {"▁no", "no", "▁No", "No", "▁NO", "NO"}
    assert "0" in spelled(words, "0")[0]  # eval.py asks for a digit


def test_a_spelling_that_only_one_word_has_is_left_out():
    """`Yes` alone would be an advantage of yes; where only ▁no has a space, no is not lost."""
    words = tokenizer(["yes", "Yes", "YES", "▁yes", "▁no", "NO"], "Llama")
    assert spelled(words, "yes", "no") == [{"yes", "YES", "▁yes"}, {"▁no", "NO"}]


def test_a_tokenizer_without_the_words_is_refused():
    with pytest.raises(ValueError, match="lacks single tokens for yes, no"):
        spelled(tokenizer(["yes", "No"], "Llama"), "yes", "no")


# ---- the shipped VLM ----


@pytest.fixture(scope="module")
def checker():
    checker = Checker.load(VLM)
    checker.probe()
    return checker


@pytest.fixture(scope="module")
def drawn():
    """50 graphs, a right and a wrong drawing of each: two objects of a triple changed places."""
    rng = random.Random(0)
    graphs, right, wrong = [], [], []
    for number in range(50):
        things, triples = world.random_prompt(rng, (3, 4, 5, 6)[number % 4], "val")
        graphs.append(SceneGraph([thing.name for thing in things], triples))
        swap = {triples[0][0]: triples[0][2], triples[0][2]: triples[0][0]}
        swapped = [thing._replace(name=swap.get(thing.name, thing.name)) for thing in things]
        right.append(Image.fromarray(world.render(things)))
        wrong.append(Image.fromarray(world.render(swapped)))
    return graphs, right, wrong


def test_right_drawings_satisfy_and_wrong_ones_do_not(checker, drawn):
    graphs, right, wrong = drawn
    accepted = [reflection.satisfied for reflection in checker.check(right, graphs)]
    refused = [not reflection.satisfied for reflection in checker.check(wrong, graphs)]
    assert sum(accepted + refused) >= 90
    assert all(reflection.mass > 0.9 for reflection in checker.check(right, graphs))


@pytest.mark.parametrize("share", [True, False])
def test_a_verdict_is_a_softmax_over_yes_and_no(drawn, share):
    """An independent reference: one forward pass per question, the prompt written by hand."""
    graphs, right, wrong = drawn
    checker = Checker.load(VLM)
    checker.share = share
    tokenizer = checker.processor.tokenizer
    answers = tokenizer.convert_tokens_to_ids(["yes", "no"])
    for image in (right[0], wrong[0]):
        (reflection,) = checker.check([image], graphs[:1])
        masses = []
        for question, prob in zip(questions(graphs[0]), reflection.probs, strict=True):
            inputs = checker.processor(
                images=image, text=f"<image> {question} <answer>", return_tensors="pt"
            )
            with torch.no_grad():
                logits = checker.model(**inputs).logits[0, -1]
            yes, no = logits[answers].float().softmax(-1).tolist()
            masses.append(logits.softmax(-1)[answers].sum().item())
            assert prob == pytest.approx(yes, abs=1e-5)
        assert reflection.mass == pytest.approx(sum(masses) / len(masses), abs=1e-5)


def test_no_images_give_no_reflections(checker):
    assert checker.check([], []) == []


@pytest.mark.parametrize("prefix", ["<s>", ""])
def test_a_template_that_begins_with_bos_gets_no_second_one(prefix):
    seen = {}

    def processor(**settings):
        seen.update(settings)
        return torch.zeros(1)

    processor.tokenizer = SimpleNamespace(bos_token="<s>")
    model = SimpleNamespace(device="cpu", dtype=torch.float32)
    vlm = SimpleNamespace(chat=lambda _, text: prefix + text, processor=processor, model=model)
    Checker.inputs(vlm, "", [Image.new("RGB", (8, 8))], ["owl?"])
    assert seen["text"] == [f"{prefix}owl?"]
    assert seen.get("add_special_tokens", True) == (prefix == "")


# ---- a VLM that does not fit ----


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped VLM, to be damaged."""
    return shutil.copytree(VLM, tmp_path / "vlm")


def change_template(folder, ending):
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + ending)
    return Checker.load(folder)


@pytest.mark.parametrize(
    "ending",
    ["<think>\n", "[THINK]", "<|START_THINKING|>", "<|channel>thought\n", "[BEGIN_REASON]"],
)
def test_a_template_that_ends_inside_a_thought_is_refused(folder, ending):
    with pytest.raises(ValueError, match=f"template of {folder} ends inside a thought"):
        change_template(folder, ending).probe()


@pytest.mark.parametrize("ending", [" yes", "The answer", "{"])
def test_a_template_after_which_no_answer_comes_is_refused(folder, ending):
    with pytest.raises(ValueError, match=f"{folder} gives yes and no together .* of another model"):
        change_template(folder, ending).probe()


def test_a_checker_that_hardly_says_yes_or_no_is_reported_once(folder, caplog):
    """On real images: `probe` sees blank ones only."""
    checker = change_template(folder, " yes")
    for _ in range(2):
        checker.check([Image.new("RGB", (32, 32))], [GRAPH])
    (record,) = caplog.records
    assert "its scores are noise" in record.message


def test_a_folders_generation_defaults_are_dropped(folder):
    """They would change what a judge answers."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"no_repeat_ngram_size": 2}))
    config = Checker.load(folder).model.generation_config
    assert config.eos_token_id == [1] and not config.no_repeat_ngram_size


def test_a_template_that_drops_the_question_is_refused(folder):
    (folder / "chat_template.jinja").write_text("<image> <answer>")
    with pytest.raises(ValueError, match="drops the text of the message"):
        Checker.load(folder).probe()


@pytest.mark.parametrize("flag", ["enable_thinking", "thinking"])
def test_a_template_that_can_do_without_a_thought_is_asked_to(folder, flag):
    choice = f"{{% if {flag} is not defined or {flag} %}}<think>{{% endif %}}"
    change_template(folder, choice).probe()
    for ending in ("<think>\n\n</think>\n\n", "<|START_THINKING|><|END_THINKING|>"):
        assert not OPEN_THOUGHT.search(f"<answer>{ending}")


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        ("{{ messages[0].content[0].text }}|{{ messages[1].content[1].text }}", "be brief|owl?"),
        ("{{ messages[0].content | trim }}|{{ messages[1].content[1].text }}", "be brief|owl?"),
        ("{{ messages[0].content + '|' }}{{ messages[1].content[1].text }}", "be brief|owl?"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ messages[0].content[1].text }}",
            "be brief owl?",
        ),
    ],
)
def test_templates_take_a_system_message_in_different_ways(folder, template, chat):
    (folder / "chat_template.jinja").write_text(template)
    assert Checker.load(folder).chat("be brief", "owl?") == chat


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only for pairs of owls') }}", "only for pairs of owls"),
        ("{{ messages[-1].content | trim }}", "it prints the list"),
    ],
)
def test_a_template_that_fails_is_told(folder, template, reason):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"chat template fails: {reason}"):
        Checker.load(folder).chat("be brief", "owl?")


def test_a_family_that_cannot_share_is_asked_one_by_one(drawn, checker, caplog, monkeypatch):
    graphs, right, _ = drawn
    expected = checker.check(right[:2], graphs[:2])
    other = Checker(checker.model, checker.processor)
    shared = other.shared_logits

    def fails(*_):
        raise TypeError("no cache here")

    for wrong, reason in ((fails, "no cache here"), (lambda *rows: -shared(*rows), "would change")):
        monkeypatch.setattr(other, "shared_logits", wrong)
        other.probe()
        told = caplog.messages[-1]
        assert "\n" not in told and "encodes its image anew" in told and reason in told
        assert not other.share
        for one, two in zip(other.check(right[:2], graphs[:2]), expected):
            assert one.probs == pytest.approx(two.probs, abs=1e-5)


def test_missing_weights_are_refused_by_name(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if "lm_head.weight" in name]
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights of lm_head.weight"):
        Checker.load(folder)


def test_weights_of_another_shape_are_refused_by_name(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if "lm_head.weight" in name]
    save_file(tensors | {name: tensors[name][1:].contiguous()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[98, 128\]; .* \[99, 128\]"):
        Checker.load(folder)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        Checker.load(folder)


def test_remote_code_is_never_run(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError):
        Checker.load(folder)
    assert not (folder / "ran").exists()
