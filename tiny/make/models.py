"""The tiny models: their architectures, their tokenizers and nothing learned.

`build_pipeline` makes a `FluxKontextPipeline` (2.8 M parameters: text-to-image without an image,
an instruction editor with one) and `build_vlm` a LLaVA-type VLM. Both are ordinary classes of
diffusers and transformers, saved with `save_pretrained` and loaded with `from_pretrained`.
"""

import torch
from world import CELL, NAMES, RELATIONS, SIZE

# One patch of the transformer is one cell of the world: VAE factor 4, packed 2 x 2.
LATENT_CHANNELS = 4
PROMPT_TOKENS = 18  # of the longest prompt, six triples
INSTRUCTION_TOKENS = 8  # of the longest instruction, with room for one word more
INSTRUCTION_WORDS = "move add remove swap change to and the a".split()
# "red circle" and "left of" are one token each, or models of this size mix up what belongs to what;
# and so is a run of punctuation such as `"],["` in the JSON of the VLM.
TOKEN = rf"</?\w+>|{'|'.join(NAMES)}|left of|right of|\w+|[^\w\s<]+"


def word_tokenizer(words, max_length, ignore="", end=True):
    """A word-level `PreTrainedTokenizerFast` in lower case.

    Args: words: the vocabulary, beside padding, end and unknown; max_length: tokens;
    ignore: characters read as spaces; end: whether `</s>` closes a text.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    blank = [normalizers.Replace(character, " ") for character in ignore]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *blank])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "removed", invert=True)
    words_apart = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.decoder = decoders.Sequence([words_apart, decoders.Replace(" ;", ";")])
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def build_pipeline(seed=0):
    """The untrained text-to-image and editing pipeline."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxKontextPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    words = [*NAMES, *RELATIONS, *INSTRUCTION_WORDS]
    # Without punctuation a prompt of six triples has 18 tokens, and CLIP's one more for its end.
    clip_tokenizer = word_tokenizer(words, PROMPT_TOKENS + 1, ";,.")
    t5_tokenizer = word_tokenizer(words, PROMPT_TOKENS, ";,.", end=False)
    vocabulary = len(t5_tokenizer)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=PROMPT_TOKENS + 1,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    look_around(text_encoder_2)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=LATENT_CHANNELS * 4,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def look_around(encoder):
    """Turns each of the T5 encoder's heads to one neighbour: -1, +1, -2, +2 words away.

    Its position biases start near zero and, at the learning rate of all others, would be there
    still after thousands of steps: a bag of words, which can't tell who is left of whom.
    """
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    ahead = encoder.config.relative_attention_num_buckets // 2
    with torch.no_grad():
        for head, bucket in enumerate((1, ahead + 1, 2, ahead + 2)):
            bias[:, head] = 0
            bias[bucket, head] = 4


# The tiny VLM knows its tasks by heart: its chat format leaves the system message out.
CHAT = (
    "{% for message in messages if message.role == 'user' %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}<answer>"
)


def build_vlm(words, seed=0):
    """The untrained VLM and its processor. Args: words: every token of the texts it will read."""
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    torch.manual_seed(seed)
    tokenizer = word_tokenizer(["<image>", "<answer>", *words], 512, end=False)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(
            size={"height": SIZE, "width": SIZE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        chat_template=CHAT,
    )
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=SIZE,
            patch_size=CELL,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        ),
        image_token_index=image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    return model, processor
