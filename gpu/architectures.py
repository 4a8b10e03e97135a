"""Real architectures with random weights, built directly on the current torch device.

For measuring (`check.py`, `memory.py`) and for testing, where nothing can be downloaded. The sizes
are in `architectures.yaml`. The tokenizers are stand-ins that know few words. So is the processor
of the Qwen-VL models, because the real one needs torchvision.
"""

from pathlib import Path

import yaml

SIZES = yaml.safe_load((Path(__file__).parent / "architectures.yaml").read_text())
VOCABULARY = "yes no 0 1 2 3 4 5 6 7 8 9 red blue circle square move the left right of".split()
SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]  # Qwen's names
VISION_IDS = {"image_token_id": 3, "video_token_id": 4}  # ids of `SPECIAL`
VISION_IDS |= {"vision_start_token_id": 5, "vision_end_token_id": 6}
# An image in a message is one placeholder, which the processor repeats for every image token.
CHAT = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }} "
    "{% else %}{% for part in message.content %}{{ image if part.type == 'image' else part.text }} "
    "{% endfor %}{% endif %}{% endfor %}"
)


def tokenizer(
    max_length=512, special=SPECIAL, image="<|vision_start|><|image_pad|><|vision_end|>", **more
):
    """A word-level `PreTrainedTokenizerFast` with ids below 64; it does not know other words.

    Args: special: the tokens with ids from 3; image: the placeholder of an image in a chat.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "</s>", "<unk>", *special, *VOCABULARY]
    ids = {word: index for index, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="right",
        chat_template=f"{{% set image = '{image}' %}}" + CHAT,
        **more,
    )


class QwenProcessor:
    """A stand-in for the processor of Qwen-VL models; its image processor is the real one."""

    def __init__(self, patch_size):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        self.tokenizer = tokenizer()
        self.image_processor = Qwen2VLImageProcessorPil(patch_size=patch_size)
        self.batch_decode = self.tokenizer.batch_decode

    def apply_chat_template(self, messages, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def __call__(self, images, text, padding, return_tensors):
        from transformers import BatchFeature

        vision = self.image_processor(images=images, return_tensors=return_tensors)
        counts = vision["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2
        prompts = [
            prompt.replace(SPECIAL[0], SPECIAL[0] * count)
            for prompt, count in zip(text, counts.tolist())
        ]
        words = self.tokenizer(prompts, padding=padding, return_tensors=return_tensors)
        types = (words["input_ids"] == VISION_IDS["image_token_id"]).long()
        return BatchFeature({**words, **vision, "mm_token_type_ids": types})


def build(name, tiny):
    """One model by its key in `architectures.yaml`, on torch's default device."""
    import diffusers
    import transformers

    kind = name.split()[0]  # without the size
    settings = dict(SIZES["real"][name])
    if tiny:
        settings |= SIZES["tiny"][kind]
    if hasattr(diffusers, kind):
        return getattr(diffusers, kind)(**settings).eval()
    kind = getattr(transformers, kind)
    if "vision_config" in settings:
        settings |= VISION_IDS
    return kind(kind.config_class(**settings)).eval()


def kontext(tiny):
    """A `FluxKontextPipeline`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=build("AutoencoderKL", tiny),
        text_encoder=build("CLIPTextModel", tiny),
        tokenizer=tokenizer(77),
        text_encoder_2=build("T5EncoderModel", tiny),
        tokenizer_2=tokenizer(512),
        transformer=build("FluxTransformer2DModel", tiny),
    )


def klein(tiny, distilled=False):
    """A `Flux2KleinPipeline`; the distilled one has no guidance, so one transformer call a step."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=build("AutoencoderKLFlux2", tiny),
        text_encoder=build("Qwen3ForCausalLM", tiny),
        tokenizer=tokenizer(512),
        transformer=build("Flux2Transformer2DModel", tiny),
        is_distilled=distilled,
    )


def qwen_vl(name, tiny):
    """(model, processor) of a Qwen-VL model; its completions end with token 1."""
    model = build(name, tiny)
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    return model, QwenProcessor(model.config.vision_config.patch_size)
