"""Many questions about an image in one sequence, and the VLM's loss on them.

All questions stand behind the image's tokens, each blind to the others and at the same positions
as if it stood alone: ten times the supervision for one encoding of the image.
"""

import torch
import world


def to_tensor(images):
    """(N, 32, 32, 3) uint8 -> (N, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def pack(tokenizer, conversations, emphasis=1.0):
    """Packs all questions about an image behind its image tokens, blind to each other.

    Args: conversations: per image a list of (user message, answer, weight); emphasis: relation
    words in answers weigh so many times as much. They take looking, most other words are copied.
    Returns: input_ids (B, T), attention mask (B, 1, T, T) fp32 additive, position_ids (B, T),
    next-token weights (B, T): zero but where the next token belongs to an answer.
    """
    image = [tokenizer.convert_tokens_to_ids("<image>")] * world.GRID**2
    start = len(image)
    relations = set(tokenizer.convert_tokens_to_ids(world.RELATIONS))
    rows = []
    for conversation in conversations:
        ids, segment, position, weight = list(image), [0] * start, list(range(start)), [0.0] * start
        asked = tokenizer([text + " <answer>" for text, _, _ in conversation]).input_ids
        answered = tokenizer([answer + " </s>" for _, answer, _ in conversation]).input_ids
        for number, (question, answer) in enumerate(zip(asked, answered), 1):
            share = conversation[number - 1][2]
            length = len(question) + len(answer)
            ids += question + answer
            segment += [number] * length
            position += range(start, start + length)
            weight += [0.0] * (len(question) - 1)
            weight += [share * (emphasis if token in relations else 1.0) for token in answer]
            weight += [0.0]
        rows.append((ids, segment, position, weight))
    longest = max(len(row[0]) for row in rows)
    padded = [[value + [0] * (longest - len(value)) for value in row] for row in rows]
    ids, segment, position, weight = (torch.tensor([row[i] for row in padded]) for i in range(4))
    same = segment[:, :, None] == segment[:, None, :]
    seen = (same | (segment == 0)[:, None, :]) & torch.ones(longest, longest).tril().bool()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return ids, mask[:, None], position, weight


def vlm_loss(model, tokenizer, images, conversations, emphasis=1.0):
    """Weighted cross-entropy of all answers; and the accuracy of the yes/no verdicts."""
    ids, mask, position, weight = pack(tokenizer, conversations, emphasis)
    hidden = model.model(
        input_ids=ids,
        pixel_values=to_tensor(images),
        attention_mask=mask,
        position_ids=position,
        use_cache=False,
    ).last_hidden_state
    chosen = weight[:, :-1] > 0
    logits = model.lm_head(hidden[:, :-1][chosen])
    targets = ids[:, 1:][chosen]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    verdicts = torch.isin(targets, torch.tensor(tokenizer.convert_tokens_to_ids(["yes", "no"])))
    right = (logits.argmax(-1) == targets).float()
    weights = weight[:, :-1][chosen]
    shown = {
        "verdicts": f"{right[verdicts].mean().item():.3f}",
        "others": f"{right[~verdicts].mean().item():.3f}",
    }
    return (losses * weights).sum() / weights.sum(), shown
