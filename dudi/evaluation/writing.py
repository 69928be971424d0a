"""What a model writes for the items' prompts, greedily, beside the references: n-grams for chrF++,
lengths, and whether it is in the language."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dudi.evaluation.fidelity import Judge
from dudi.evaluation.figures import chrf_counts
from dudi.evaluation.items import Item
from dudi.evaluation.scoring import batches, tensors
from dudi.rollout import ends_of, generate


def write(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],  # encoded
    pad: int,
    batch_size: int,
    max_length: int,
    tell: Callable[[int], None],
) -> list[tuple[str, bool]]:
    """A greedy generation for each row's prompt, in the rows' order, and whether it has an end."""
    texts = [("", False)] * len(rows)
    for part in batches(rows, batch_size, tell):
        rollout = generate(
            model,
            tensors([rows[i] for i in part], "prompt_ids"),
            max_completion_length=max_length,
            eos_token_id=ends_of(model, tokenizer),
            pad_token_id=pad,
            temperature=0.0,
        )
        own = zip(part, rollout.completions, rollout.finish_reasons, strict=True)
        for i, completion, reason in own:
            text = tokenizer.decode(completion, skip_special_tokens=True)
            ended = reason == "eos"
            texts[i] = (text if ended else text.rstrip("\ufffd"), ended)  # cut within a character
    return texts


def judges(languages: Sequence[str]) -> dict[str, Judge]:
    return {language: Judge(language) for language in sorted(set(languages))}


def written_values(
    item: Item, text: str, metrics: Sequence[str], judge: Mapping[str, Judge]
) -> dict[str, Any]:
    """Values of an item's row for what was written."""
    reference = item.completion
    values: dict[str, Any] = {}
    if "chrf" in metrics:
        values["chrf"] = chrf_counts(text, reference)
    if "length_ratio" in metrics:
        values |= {"written": len(text.strip()), "reference": len(reference.strip())}
    own = judge.get(item.language)
    if "fidelity" in metrics and own is not None and not own.reason and own.counts(reference):
        values |= {
            "judged": 1,
            "faithful": int(own.faithful(text)),
            "faithful_reference": int(own.faithful(reference)),
        }
    return values
