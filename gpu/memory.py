"""GPU memory that `gpu/*.yaml` need, counted on the meta device: no GPU, no weights, no download.

A tensor on the meta device has a shape and no data. This script builds the real architectures
(`architectures.yaml`) there, runs the stages of an iteration at their real batch sizes, and adds up
the bytes of all tensors that are alive at the same time.

    python gpu/memory.py                                      # the YAML files of both phases
    python gpu/memory.py gpu/phase2.yaml group_size=8 micro_batch=8

    weights   bf16, as far as they are on the GPU in that stage (`offload: true` moves the pipeline)
    trained   the LoRA adapter in fp32: parameters, gradients, Adam's two moments
    working   the most bytes alive at once beside these two: activations, gradients, logits, cache

Limits: the attention kernel is assumed to be a fused one (`attention: sdpa`). The CUDA context
(about 0.5 GiB) and the allocator's fragmentation (often 10%) come on top. Vision towers and the
recorded steps of a rollout are left out; they are small. PROMPT and QUESTION are assumed lengths.
"""

import argparse
import sys
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "gpu")]

import architectures  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from actor import Actor  # noqa: E402
from config import TrainConfig, load_config  # noqa: E402
from diffuser import Diffuser  # noqa: E402
from editor import Editor  # noqa: E402
from grpo import chunked_token_log_probs, gaussian_kl, sde_step  # noqa: E402

GIB = 2**30
VLMS = {
    "Qwen/Qwen3-VL-8B-Instruct": "Qwen3VLForConditionalGeneration 8B",
    "Qwen/Qwen3-VL-4B-Instruct": "Qwen3VLForConditionalGeneration",
    "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen2_5_VLForConditionalGeneration",
}
PROMPT = 256 + 200  # tokens the Actor reads: a 512 x 512 image, and text
QUESTION = 256 + 50  # tokens of a Checker's question
DEFAULTS = ["phase1.yaml", "phase2.yaml", "phase1_24gb.yaml", "phase2_24gb.yaml"]


class LiveBytes(TorchDispatchMode):
    """Inside this mode, `peak` is the most bytes of new tensors that were alive at once."""

    def __init__(self, known):
        super().__init__()
        # Storages that are not counted, such as weights. Their views share the storage.
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        address = storage._cdata
        if address not in self.known:
            self.known.add(address)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, address, storage.nbytes())

    def forget(self, address, size):
        self.known.discard(address)
        self.live -= size


class FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps; on the meta device torch would build the full matrix."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        lengths = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, lengths)
        return output

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def fused_attention(query, key, value, *_, **__):
    return FusedAttention.apply(query, key, value)


def peak(model, run):
    """The most bytes alive at once while `run()` runs, beside the model's own."""
    known = [*model.parameters(), *model.buffers()]
    before = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = fused_attention
    try:
        with LiveBytes(known) as counter:
            run()
    finally:
        torch.nn.functional.scaled_dot_product_attention = before
    grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    return counter.peak - grads  # gradients count as "trained"


def size(module):
    return sum(parameter.nbytes for parameter in module.parameters())


def language_pass(model, rows, tokens, outputs, cache=False):
    """One forward pass of a VLM's language model: (logits (rows, outputs, V), cache or None)."""
    text = model.model.language_model
    result = text(
        inputs_embeds=torch.empty(rows, tokens, text.config.hidden_size, dtype=torch.bfloat16),
        position_ids=torch.empty(3, rows, tokens, dtype=torch.long),
        use_cache=cache,
    )
    return model.lm_head(result.last_hidden_state[:, -outputs:]), result.past_key_values


def flow_pass(pipeline, call, rows, editing):
    """One call of a klein transformer: its velocity (rows, image tokens, channels)."""
    image = (call["height"] // 16) * (call["width"] // 16)  # the VAE divides by 8, packing by 2
    text = call.get("max_sequence_length", 512)
    config = pipeline.transformer.config
    tokens = image * (1 + editing)  # the edited image is read beside the latents
    half = {"dtype": torch.bfloat16}
    return pipeline.transformer(
        hidden_states=torch.empty(rows, tokens, config.in_channels, **half),
        encoder_hidden_states=torch.empty(rows, text, config.joint_attention_dim, **half),
        timestep=torch.empty(rows, **half),
        img_ids=torch.empty(rows, tokens, 4),
        txt_ids=torch.empty(rows, text, 4),
        return_dict=False,
    )[0][:, :image]


def measure(config):
    """{stage: (weights, trained, working) in bytes} of one YAML file."""
    torch.set_default_dtype(torch.bfloat16)
    pipeline = architectures.klein(tiny=False)
    vlm, processor = architectures.qwen_vl(VLMS[config.actor.model], tiny=False)
    torch.set_default_dtype(torch.float32)
    vlm.set_attn_implementation("sdpa")
    actor = Actor(vlm, processor, checkpointing=config.actor.checkpointing)
    Diffuser(pipeline)  # freezes its parameters
    editor = Editor(pipeline)
    if config.editor.checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    parts = {name: size(getattr(pipeline, name)) for name in ("text_encoder", "transformer", "vae")}
    shared = config.diffuser.model == config.editor.model
    model = size(vlm)
    if config.judge:
        model += size(architectures.build(VLMS[config.judge.model], tiny=False).bfloat16())
    everything = model + sum(parts.values()) * (1 if shared else 2)
    parameters = (actor, editor)[config.phase - 1].add_adapter(config.rank)
    adapter = 4 * sum(p.nbytes for p in parameters)  # parameters, gradients, two moments

    def weights(part=None):
        """Bytes of weights on the GPU while a part of the pipeline, or none, is running."""
        return model + parts.get(part, 0) if config.offload else everything

    editing, G = config.editor.call, config.group_size
    completions = config.actor.batch_size * (G if config.phase == 1 else 1)
    height, width = config.diffuser.call["height"] // 8, config.diffuser.call["width"] // 8
    stages = {}

    def stage(name, part, model, run, grad=False):
        with torch.set_grad_enabled(grad):
            stages[name] = (weights(part), adapter, peak(model, run))

    def act():
        logits, cache = language_pass(vlm, completions, PROMPT, 1, cache=True)
        extra = config.actor.max_new_tokens
        grown = [
            torch.empty(*x.shape[:2], x.shape[2] + extra, x.shape[3], dtype=x.dtype)
            for layer in cache.layers
            for x in (layer.keys, layer.values)
        ]
        return logits, grown[-2:], cache  # one layer at a time is copied as it grows

    def decode():
        channels = pipeline.vae.config.latent_channels
        rows = config.diffuser.batch_size
        pipeline.vae.decode(torch.empty(rows, channels, height, width, dtype=torch.bfloat16))

    def replay_completions():
        rows, tokens = config.micro_batch, config.actor.max_new_tokens
        vlm.train(config.actor.checkpointing)
        with actor.adapter():
            logits, _ = language_pass(vlm, rows, PROMPT + tokens, tokens + 1)
            ids = torch.empty(rows, tokens, dtype=torch.long)
            chunked_token_log_probs(logits[:, :-1], ids).sum().backward()
        vlm.eval()

    def replay_step():
        rows = max(config.micro_batch // G, 1) * G if editor.batched else G
        calls = 2 if editing.get("guidance_scale", 4.0) > 1 else 1  # with and without the prompt
        with editor.adapter():
            answers = [flow_pass(pipeline, editing, rows, True) for _ in range(calls)]
            velocity = sum(answer.float() for answer in answers)
            sample = torch.empty_like(velocity)
            _, log_probs, mean, std = sde_step(velocity, sample, 0.9, 0.8, 0.9, sample)
            kl = gaussian_kl(mean, torch.empty_like(mean), std)
            (log_probs.sum() + kl.sum()).backward()

    batch = config.editor.batch_size if editor.batched else 1  # different edits in one call
    rows = batch if config.phase == 1 else G
    stage("generate: VAE", "vae", pipeline.vae, decode)
    stage(
        "check",
        None,
        vlm,
        lambda: language_pass(vlm, config.checker.batch_size, QUESTION, 1, cache=True),
    )
    stage("act", None, vlm, act)
    text = pipeline.text_encoder
    tokens = editing.get("max_sequence_length", 512)
    read = {"input_ids": torch.empty(1, tokens, dtype=torch.long), "output_hidden_states": True}
    stage("edit: text encoder", "text_encoder", text, lambda: text.model(**read))
    transformer = pipeline.transformer
    stage(
        "edit: transformer",
        "transformer",
        transformer,
        lambda: flow_pass(pipeline, editing, rows, True),
    )
    if config.phase == 1:
        stage("update", None, vlm, replay_completions, grad=True)
    else:
        stage("update", "transformer", transformer, replay_step, grad=True)
    return stages


def main():
    parser = argparse.ArgumentParser(description="GPU memory of gpu/*.yaml, without a GPU.")
    parser.add_argument("words", nargs="*", metavar="FILE of train.py or key=value")
    words = parser.parse_intermixed_args().words
    overrides = [word for word in words if "=" in word]
    files = [word for word in words if "=" not in word]
    files = files or [ROOT / "gpu" / name for name in DEFAULTS]
    print("| model | billions of parameters | GiB in bf16 |\n|---|---|---|")
    for name in architectures.SIZES["real"]:
        with torch.device("meta"):
            model = architectures.build(name, tiny=False).bfloat16()
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"| {name} | {count / 1e9:.2f} | {size(model) / GIB:.1f} |")
    print("\nGiB: weights + trained + working = peak\n")
    for file in files:
        placeholders = [f"{key}={ROOT}/tiny/data/val.json" for key in ("data", "validation")]
        try:
            config = load_config(file, TrainConfig, [*placeholders, *overrides])
        except ValueError as error:
            sys.exit(f"memory.py: {error}")
        print(f"| {Path(file).name} | weights | trained | working | peak |\n|---|---|---|---|---|")
        with torch.device("meta"):
            stages = measure(config)
        for name, sizes in stages.items():
            cells = [f"{value / GIB:.1f}" for value in (*sizes, sum(sizes))]
            print(f"| {name} | {' | '.join(cells)} |")
        print(f"| highest | | | | {max(map(sum, stages.values())) / GIB:.1f} |\n")


if __name__ == "__main__":
    main()
