"""DPO in a plain loop: the log-probabilities of whole responses, without logits.

    python examples/dpo.py --steps 20

Pairs (chosen, rejected) are packed one after the other, chosen first. `sequence_log_prob` gives a
number for each of them, differentiable, from hidden states and head. The data: translations that
are right, against those of other rows.
"""

import argparse

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from dudi.demo_data import data_path, translation_rows
from dudi_kernels import LMHead, sequence_log_prob


def packed(tokenizer, prompts, responses):
    """Ids and mask (B, T), and the rows that predict tokens of the responses."""
    asked = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)
        for p in prompts
    ]
    told = [
        [*tokenizer(r, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for r in responses
    ]
    length = max(len(p) + len(r) for p, r in zip(asked, told, strict=True))
    ids = torch.full((len(asked), length), tokenizer.eos_token_id)
    mask, learnt = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, r) in enumerate(zip(asked, told, strict=True)):
        ids[i, : len(p) + len(r)] = torch.tensor([*p, *r])
        mask[i, : len(p) + len(r)] = 1
        learnt[i, len(p) - 1 : len(p) + len(r) - 1] = True  # state t predicts token t + 1
    return ids, mask, learnt


def log_probs(model, ids, mask, learnt):
    """(B,) log-probability of each response."""
    hidden = model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    targets = ids.roll(-1, 1)
    segments = torch.arange(len(ids))[:, None].expand_as(ids)
    return sequence_log_prob(
        hidden[learnt], LMHead.from_model(model), targets[learnt], segments[learnt]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(data_path("teacher"))
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(data_path("teacher"), dtype=torch.float32)
        for _ in range(2)
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    rows = translation_rows("train")
    for step in range(args.steps):
        picked = [rows[int(i)] for i in torch.randint(len(rows), (args.batch_size,))]
        chosen = [row["completion"][0]["content"] for row in picked]
        rejected = chosen[1:] + chosen[:1]
        batch = packed(tokenizer, [row["prompt"] for row in picked] * 2, chosen + rejected)
        with torch.no_grad():
            start = log_probs(reference, *batch)
        gain = log_probs(policy, *batch) - start
        margin = gain[: args.batch_size] - gain[args.batch_size :]
        loss = -F.logsigmoid(args.beta * margin).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.4f}  margin {margin.mean().item():.3f}")


if __name__ == "__main__":
    main()
