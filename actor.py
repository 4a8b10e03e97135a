"""Actor: the VLM that reads image, prompt and feedback, and writes one edit instruction.

    <think>the red circle is right of the blue square</think>
    <edit>move the red circle left of the blue square</edit>

A completion of any other form is malformed and edits nothing; `<edit>none</edit>` asks for no edit.
The public text of RL-RIG (arXiv 2602.19974) does not give the paper's form.

Phase 1 trains a LoRA adapter: `propose` samples completions and keeps their ids and log-probs,
`replay` scores the same ids again, with gradient.

The adapter is active only inside `propose` and `adapter()`. A Checker that shares the model never
sees it; otherwise the policy would grade itself.
"""

import copy
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import safetensors.torch
import torch
from torch.nn.utils.rnn import pad_sequence

from checker import OPEN_THOUGHT, VLM
from grpo import chunked_token_log_probs, completion_mask, token_log_probs

SYSTEM = (
    "You repair images that do not fit their prompt. Think about what is wrong and how one edit "
    "can mend it without breaking the rest. Answer with <think>your reasoning</think><edit>one "
    "instruction to an image editor</edit>, such as <edit>move the red cup left of the blue book"
    "</edit>, or <edit>none</edit> if nothing should change."
)
FORM = re.compile(r"\s*<think>(.*?)</think>\s*<edit>(.*?)</edit>\s*", re.DOTALL)
ADAPTER = "actor"
# The language model only; the vision tower is not trained. in_proj_*, out_proj: of linear attention
# (Qwen3.5).
TARGETS = r".*(language|text)_model\..*((q|k|v|o|gate|up|down|out)_proj|in_proj\w*)"


def request(prompt, feedback, tried=()):
    """The user message. tried: instructions that did not improve this image."""
    text = f"Prompt: {prompt}. {feedback or 'nothing is wrong'}."
    return f"{text} Tried without success: {'; '.join(tried)}." if tried else text


def parse_completion(text):
    """(thought, instruction) of a completion. A malformed one gives (text, None)."""
    match = FORM.fullmatch(text)
    if match is None or not match[2].strip() or "<" in match[1] + match[2]:
        return text.strip(), None
    instruction = " ".join(match[2].split())
    return match[1].strip(), "none" if instruction.lower() in ("none", "none.") else instruction


@dataclass
class Proposals:
    """N sampled completions; those of one image are neighbors."""

    images: list  # (N) PIL images
    requests: list[str]  # (N) user messages, as `request` makes them
    ids: torch.Tensor  # (N, T) token ids of the completions, padded on the right
    mask: torch.Tensor  # (N, T) bool, True up to and including the first end token
    log_probs: torch.Tensor  # (N, T) fp32, recorded while sampling
    thoughts: list[str]
    instructions: list[str | None]  # None: malformed; "none": the Actor wants no edit
    truncated: list[bool]  # no end token within `max_new_tokens`


class Actor(VLM):
    """A VLM that writes edit instructions.

    Args:
        model, processor, batch_size: see `VLM`.
        max_new_tokens: longest completion.
        temperature: of sampling, above 0. Log-probs are of the distribution at this temperature.
        checkpointing: recompute activations in `replay`: less memory, a third more time. The
            completions of a request then cannot share one reading of it.
    """

    def __init__(
        self,
        model,
        processor,
        batch_size=64,
        max_new_tokens=256,
        temperature=1.0,
        checkpointing=False,
    ):
        super().__init__(model, processor, batch_size)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.has_adapter = False
        self.checkpointing = checkpointing
        if checkpointing:
            self.model.activation_checkpointing_enable()
            self.model.disable_input_require_grads()  # only reentrant checkpointing needs it
        # A sampled image token ends a completion, too.
        visual = {getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")}
        self.end_ids = [*self.end_ids, *(visual - {None})]

    def probe(self):
        """Call once after loading: turn sharing on if it works on two blank images.

        Raises ValueError if the chat template ends inside a thought that `propose` does not know,
        or if the tags of a completion are special tokens, which decoding drops.
        """
        chat = self.chat(SYSTEM, "").rstrip()
        if OPEN_THOUGHT.search(chat) and not chat.endswith("<think>"):
            raise ValueError("the chat template ends inside a thought, which is not <think>")
        tokenizer = self.processor.tokenizer
        tags = ("<think>", "</think>", "<edit>", "</edit>")
        ids = tokenizer("".join(tags), add_special_tokens=False).input_ids
        whole, shown = tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)
        if lost := [tag for tag in tags if tag in whole and tag not in shown]:
            raise ValueError(f"its tokenizer has {lost[0]} as a special token, so drops it")
        text = tokenizer("red circle left of", add_special_tokens=False)
        ids = torch.tensor([text["input_ids"]] * 4, device=self.model.device)  # (4, T)
        circle, square = request("red circle", ""), request("blue square left of red circle", "")
        self.try_sharing(SYSTEM, [circle, circle, square, square], ids, torch.ones_like(ids))

    def propose(self, images, prompts, feedback, seeds, n=1, tried=None, temperature=None):
        """Sample n completions for each of B images: `Proposals` of N = B * n.

        Args: B PIL images; B prompts; B `Reflection.feedback`; B ints; tried: B lists of strings;
        temperature: instead of the Actor's own. `replay` uses its own, so do not train on these.
        Completion k of an image depends on its seed and on k, not on what else is in the batch.
        """
        if len(images) != len(seeds):
            raise ValueError(f"{len(images)=}, {len(seeds)=}: need the same")
        if not images:
            empty = torch.zeros(0, 0)
            return Proposals([], [], empty.long(), empty.bool(), empty, [], [], [])
        tried = tried or [()] * len(images)
        temperature = self.temperature if temperature is None else temperature
        requests = [request(*each) for each in zip(prompts, feedback, tried, strict=True)]
        # `_Sampler`, below, draws each token; `top_k` 0 saves `generate` a search.
        settings = {"do_sample": True, "top_k": 0, "num_return_sequences": n}
        settings |= {"max_new_tokens": self.max_new_tokens, "eos_token_id": self.end_ids}
        ids, log_probs = [], []  # per completion, as long as its batch: (T_batch,)
        with self.adapter(), torch.no_grad(), torch.random.fork_rng():
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                inputs = self.inputs(SYSTEM, images[part], requests[part])
                rngs = [Random(f"{seed} {k}") for seed in seeds[part] for k in range(n)]
                sampler = _Sampler(rngs, temperature)
                output = self.model.generate(**inputs, **settings, logits_processor=[sampler])
                ids += output[:, inputs["input_ids"].shape[1] :]
                log_probs += torch.cat(sampler.log_probs, 1)
        ids = pad_sequence(ids, batch_first=True, padding_value=self.end_ids[0])  # (N, T)
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        # A template for thinking may give the opening tag itself, or a whole, empty thought.
        given = re.search(r"(<think>(\s*</think>)?\s*)?$", self.chat(SYSTEM, ""))[0]
        parsed = []
        for text in texts:
            thought, instruction = parse_completion(given + text)
            if instruction is None:  # the Actor may have written the tags again
                thought, instruction = parse_completion(text)
            parsed.append((thought, instruction))
        thoughts, instructions = zip(*parsed)
        return Proposals(
            images=[image for image in images for _ in range(n)],
            requests=[text for text in requests for _ in range(n)],
            ids=ids,
            mask=completion_mask(ids, self.end_ids),
            log_probs=pad_sequence(log_probs, batch_first=True),
            thoughts=list(thoughts),
            instructions=list(instructions),
            truncated=(~torch.isin(ids, ids.new_tensor(self.end_ids)).any(1)).tolist(),
        )

    def replay(self, proposals, rows):
        """Log-probs of the completions in `rows` (a slice) again, with gradient: (R, T) fp32."""
        images, requests = proposals.images[rows], proposals.requests[rows]
        ids, mask = proposals.ids[rows], proposals.mask[rows]  # (R, T)
        # An image token ends a completion, but as an input it would need an image. Nothing after
        # an end counts, so every end is fed as the same token.
        is_end = torch.isin(ids, ids.new_tensor(self.end_ids))
        ids_to_read = ids.masked_fill(is_end, self.end_ids[0])
        logits_of = self.shared_logits if self.share else self.single_logits
        # transformers recomputes activations in training mode only.
        self.model.train(self.checkpointing)
        logits = logits_of(SYSTEM, images, requests, ids_to_read, mask)  # (R, T, V)
        self.model.eval()
        return chunked_token_log_probs(logits, ids, self.temperature)

    def single_logits(self, system, images, requests, ids, mask):
        """Logits (R, T, V) of completions, one sequence each. Args: ids (R, T); mask (R, T)."""
        inputs = self.inputs(system, images, requests)
        shape = inputs["input_ids"].shape  # (R, prompt tokens)
        completion = {"input_ids": ids, "attention_mask": mask}
        for name, value in inputs.items():
            if value.shape == shape:  # an input per token: append that of the completion
                added = completion.get(name, torch.zeros_like(ids))  # zeros: token types and such
                inputs[name] = torch.cat([value, added.to(value)], 1)  # (R, prompt tokens + T)
        self.add_positions(inputs)
        output = self.model(**inputs, logits_to_keep=ids.shape[1] + 1, use_cache=False)
        return output.logits[:, :-1]

    def shared_logits(self, system, images, requests, ids, mask):
        """The same, but the completions of a request share one reading of it."""
        return self.read_on(system, images, requests, ids, mask, keep=ids.shape[1])[:, :-1]

    # ---- the adapter ----

    def add_adapter(self, rank):
        """Add an adapter unless one is loaded; return its parameters (list, fp32).

        A new one changes nothing yet. The KL reference is the base model, without any adapter.
        Raises ValueError if the loaded adapter has another rank.
        """
        from peft import LoraConfig

        if ADAPTER not in getattr(self.model, "peft_config", {}):
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
            self.model.add_adapter(config, ADAPTER)
        found = self.model.peft_config[ADAPTER].r
        if found != rank:
            raise ValueError(f"the loaded adapter has rank {found}; set rank={found}")
        self.model.eval().disable_adapters()  # a new adapter comes active and in training mode
        parameters = [p for n, p in self.model.named_parameters() if f".{ADAPTER}." in f"{n}."]
        for parameter in parameters:
            parameter.data = parameter.data.float()  # Adam needs fp32 even if the model is bf16
        self.has_adapter = True
        return parameters

    def load_adapter(self, folder):
        """Load a folder that `save_adapter` or peft wrote, in fp32.

        Raises ValueError if it is no plain LoRA, damaged, or of another model.
        """
        from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

        try:
            tensors = safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors")
            config = PeftConfig.from_pretrained(folder)
            if config.init_lora_weights not in (True, False, "gaussian"):
                raise ValueError(f"{config.init_lora_weights!r} is not a plain LoRA")
            if config.bias != "none":
                raise ValueError("it changes biases of the base model, which the Checker may share")
            if config.modules_to_save and self.model.dtype != torch.float32:
                raise ValueError("it trains whole modules, which needs actor.dtype: float32")
            self.model.add_adapter(config, ADAPTER)
            self.add_adapter(config.r)
            named = {name.removeprefix("base_model.model."): x for name, x in tensors.items()}
            # peft may write copies of the base model's embeddings.
            base = self.model.state_dict()
            needed = get_peft_model_state_dict(
                self.model, adapter_name=ADAPTER, save_embedding_layers=False
            )
            for name in [n for n in named if n in base and n not in needed]:
                if torch.equal(named[name].to(base[name]), base[name]):
                    del named[name]
            # Check before loading: other tensors of the base model would change it, for the Checker
            # and the KL reference too. Some programs repeat the config's alpha as tensors.
            wrong = [n for n in needed.keys() ^ named.keys() if not n.endswith(".alpha")]
            wrong += [
                n for n, x in named.items() if not x.is_floating_point() or not x.isfinite().all()
            ]
            if wrong:
                raise ValueError(f"missing, unknown, or not finite: {', '.join(sorted(wrong)[:3])}")
            set_peft_model_state_dict(self.model, named, ADAPTER)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{folder} is no adapter of this Actor: {reason}") from error

    def save_adapter(self, folder):
        """Write what `PeftModel.from_pretrained(model, folder)` reads."""
        from peft import get_peft_model_state_dict

        self.model.peft_config[ADAPTER].save_pretrained(folder)
        tensors = get_peft_model_state_dict(self.model, adapter_name=ADAPTER)
        tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        # `safetensors.torch.save_file` would give the file mode 0600.
        data = safetensors.torch.save(tensors, {"format": "pt"})
        (Path(folder) / "adapter_model.safetensors").write_bytes(data)

    def without_adapter(self):
        """The untrained Actor: the same model, but `propose` leaves the adapter off."""
        untrained = copy.copy(self)
        untrained.has_adapter = False
        return untrained

    @contextmanager
    def adapter(self):
        """The adapter is active inside this block.

        Call `backward` inside it too: peft freezes the parameters of an inactive adapter.
        """
        if self.has_adapter:
            from peft.utils import ModulesToSaveWrapper

            self.model.enable_adapters()
            for module in self.model.modules():  # `enable_adapters` leaves these out
                if isinstance(module, ModulesToSaveWrapper):
                    module.enable_adapters(True)
        try:
            yield
        finally:
            if self.has_adapter:
                self.model.disable_adapters()


class _Sampler:
    """A logits processor that samples every token itself and leaves `generate` no other choice.

    Each row has random numbers of its own, one per token. The token is the one whose part of the
    cumulative distribution the number falls in (inverse CDF sampling).
    """

    def __init__(self, rngs, temperature):
        self.rngs = rngs  # (N) `random.Random`s
        self.temperature = temperature
        self.log_probs = []  # one (N, 1) fp32 per token

    def __call__(self, input_ids, logits):
        """Args: logits (N, V) of the next token. Returns logits that allow the sampled one only."""
        cdf = (logits.float() / self.temperature).softmax(-1).cumsum(-1)  # (N, V)
        # 24 bits, so that the number is exact in fp32 and below 1.
        uniform = [[rng.getrandbits(24) / 2**24] for rng in self.rngs]
        uniform = torch.tensor(uniform, device=cdf.device) * cdf[:, -1:]  # (N, 1)
        if not uniform.isfinite().all():
            raise ValueError(
                "the Actor's logits are NaN: its adapter diverged or is damaged, or "
                "actor.temperature is too small"
            )
        ids = torch.searchsorted(cdf, uniform, right=True)  # (N, 1), never of probability 0
        self.log_probs.append(token_log_probs(logits[:, None], ids, self.temperature))
        return torch.full_like(logits, -math.inf).scatter(1, ids, 0.0)
