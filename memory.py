"""What fits real models on one GPU: they take turns on it, and activations are recomputed.

offload: true         the VLM or the pipeline is on the GPU, whichever is in use, and of a pipeline
                      that trains the transformer alone; the others wait in main memory. A turn
                      moves gigabytes, which takes seconds: use large batches
checkpointing: true   a trained model keeps one activation a layer, and `backward` computes the
                      others again: a third more time
"""

from dataclasses import replace
from functools import partial


def waiting(config):
    """A `LoopConfig` whose models are loaded into main memory, as for the GPU otherwise."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("key 'offload': there is no CUDA GPU to take turns on; make it false")
    parts = {}
    for name in ("diffuser", "checker", "actor", "editor"):
        part = getattr(config, name)
        dtype = "bfloat16" if part.dtype == "auto" else part.dtype
        parts[name] = replace(part, device="cpu", dtype=dtype)
    return replace(config, **parts)


def take_turns(parts, device):
    """Lets every part bring its model to `device` when it is used, and send the others away.

    Args: parts: Diffuser, Checker, Actor and Editor; models may be shared.
    """
    models = [part.pipeline if hasattr(part, "pipeline") else part.model for part in parts]
    for part, model in zip(parts, models):
        others = [other for other in models if other is not model]
        part.arrive = partial(_arrive, model, others, device)


def _arrive(model, others, device, training=False):
    for other in others:
        other.to("cpu")
    if training:
        for part in model.components.values():
            if hasattr(part, "parameters") and part is not model.transformer:
                part.to("cpu")
        model.transformer.to(device)
    else:
        model.to(device)


def checkpoint_vlm(model):
    """Lets a transformers model recompute activations whenever it runs with gradient.

    transformers does so in training mode alone. That of the layers themselves is enough: what is
    inside them stays in evaluation mode, without dropout.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]

    def enter(*_):
        for layer in layers:
            layer.training = torch.is_grad_enabled()

    def leave(*_):
        for layer in layers:
            layer.training = False

    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # needed by an older kind of checkpointing alone
    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
